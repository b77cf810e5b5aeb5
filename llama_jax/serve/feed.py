"""From the engine's thread to the event loop: the events of one HTTP request."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any, TypeVar

from llama_jax.engine.request import Event, Finish, Piece, QueueFullError, Request
from llama_jax.errors import UserError
from llama_jax.serve.errors import ApiError
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.served import EngineLike, Ticket

_T = TypeVar('_T')
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Happened = tuple[int, Event]
"""Which of the requests, and what."""

RETRY_SECONDS = 2
KEEP_ALIVE_SECONDS = 15.0
BEHIND = 8192
"""Events of a request that may come while its client does not take what was sent before."""


class ClientGoneError(Exception):
    """Whoever asked does not listen any more."""


class Feed:
    """Submits requests and iterates over what happens to them, all of them at once.

    Whoever makes one calls `cancel` when done with it, however that came: it frees the rows of
    those that still run.
    """

    def __init__(self, engine: EngineLike, metrics: Metrics):
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Happened] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._open = 0
        self._behind = self._cancelled = False
        self._meanwhile: int | None = None  # events since what is being sent was given
        self._last: list[float] = []  # when the request was submitted, or its newest token came
        self._begun: list[bool] = []

    async def submit(self, requests: Sequence[Request]) -> None:
        """Raises ApiError when the engine refuses one or has no room for it; `cancel` takes back
        those before it."""
        now = time.perf_counter()
        self._last, self._begun = [now] * len(requests), [False] * len(requests)
        try:
            for i, request in enumerate(requests):
                ticket = self._engine.submit(request, functools.partial(self._put, i))
                self._tickets.append(ticket)
                if self._cancelled:
                    ticket.cancel()
                await asyncio.sleep(0)  # a bias of 100,000 tokens is checked anew for each choice
        except UserError as error:
            raise ApiError(400, str(error)) from None
        except QueueFullError as error:
            raise full(str(error)) from None
        self._open = len(requests)

    def cancel(self) -> None:
        self._cancelled = True
        for ticket in self._tickets:
            ticket.cancel()

    async def __aiter__(self) -> AsyncIterator[list[Happened]]:
        """What is there, in order; an empty list after a while without anything. Raises ApiError
        at last when so much waited that the rest was given up."""
        while self._open:
            happened = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    happened.append(await self._queue.get())
            while not self._queue.empty():
                happened.append(self._queue.get_nowait())
            self._open -= sum(isinstance(event, Finish) for _, event in happened)
            yield happened
        if self._behind:
            raise ApiError(
                408, f'cut off: {BEHIND} events waited for you, read faster', code='slow_reader'
            )

    def _put(self, index: int, event: Event) -> None:
        """Called on the engine's thread."""
        if isinstance(event, Piece) and event.tokens:
            now = time.perf_counter()
            seconds, self._last[index] = now - self._last[index], now
            if self._begun[index]:
                self._metrics.between_tokens(seconds, len(event.tokens))
            else:
                self._begun[index] = True
                self._metrics.first_token(seconds)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._arrived, index, event)

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Around what waits for the client: no more than BEHIND events are kept meanwhile."""
        self._meanwhile = 0
        try:
            yield
        finally:
            self._meanwhile = None

    def _arrived(self, index: int, event: Event) -> None:
        if self._meanwhile is not None:
            self._meanwhile += 1
            if self._meanwhile > BEHIND and not self._behind:
                self._behind = True
                self.cancel()
        if isinstance(event, Finish) or not self._behind:
            self._queue.put_nowait((index, event))


def full(message: str) -> ApiError:
    """The answer that asks to come back."""
    return ApiError(
        429,
        f'{message or "the queue is full"}: try again in {RETRY_SECONDS} s',
        code='queue_full',
        headers={'Retry-After': str(RETRY_SECONDS)},
    )


async def while_connected(work: Awaitable[_T], receive: Receive) -> _T:
    """The result of `work`, which is cancelled when the client goes: then ClientGoneError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())['type'] != 'http.disconnect':
        pass

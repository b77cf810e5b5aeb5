"""What happens to a request, as it is sent: a stream of events, or an answer in one piece. What is
large is written on another thread, beside the other requests."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama_jax.engine.request import Finish
from llama_jax.serve.errors import ApiError, json_response, large_response, to_json
from llama_jax.serve.feed import (
    KEEP_ALIVE_SECONDS,
    ClientGoneError,
    Feed,
    Happened,
    while_connected,
)
from llama_jax.serve.responses import Reply
from llama_jax.serve.schema import Ask

_T = TypeVar('_T')
_MANY = 2000
"""Events and log-probabilities that become JSON on the event loop, in some 10 ms."""


class EventStream(Response):
    """Server-sent events, until they end or the client goes; then `done` is called."""

    def __init__(self, events: AsyncIterator[bytes], done: Callable[[], None]):
        super().__init__(media_type='text/event-stream')
        self._events, self._done = events, done
        del self.headers['content-length']
        self.headers['cache-control'] = 'no-cache'
        self.headers['x-accel-buffering'] = 'no'  # proxies pass each event on at once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._send(send), receive)
        except (ClientGoneError, OSError):
            pass  # the status is sent, and nobody is there to be told more
        finally:
            self._done()

    async def _send(self, send: Send) -> None:
        await send(
            {
                'type': 'http.response.start',
                'status': self.status_code,
                'headers': self.raw_headers,
            }
        )
        async for data in self._events:
            await send({'type': 'http.response.body', 'body': data, 'more_body': True})
        await send({'type': 'http.response.body', 'body': b'', 'more_body': False})


async def told(feed: Feed, reply: Reply, ask: Ask) -> AsyncIterator[bytes]:
    """The stream; a failure in its midst is its last event."""

    def written(happened: list[Happened]) -> bytes:
        chunks = (chunk for index, event in happened for chunk in reply.chunks(index, event))
        return b''.join(map(_event, chunks))

    try:
        first = b''.join(map(_event, reply.opening()))
        if first:
            yield first
        sent = time.monotonic()
        async for happened in feed:
            data = await _beside(_numbers(happened), functools.partial(written, happened))
            # Of a long call nothing is told before its end.
            if data or not happened or time.monotonic() - sent >= KEEP_ALIVE_SECONDS:
                with feed.sending():
                    yield data or b': waiting\n\n'
                sent = time.monotonic()
        if ask.include_usage:
            yield _event(reply.usage_chunk())
        yield b'data: [DONE]\n\n'
    except ApiError as error:
        yield _event(error.body())


async def collected(feed: Feed, reply: Reply) -> Response:
    """The answer in one piece."""

    def take(happened: list[Happened]) -> None:
        for index, event in happened:
            for _ in reply.chunks(index, event):
                pass

    numbers = 0
    for _ in reply.opening():
        pass
    async for happened in feed:
        numbers += _numbers(happened)
        await _beside(_numbers(happened), functools.partial(take, happened))
    if numbers > _MANY:
        return await large_response(reply.whole)
    return json_response(reply.whole())


def _numbers(happened: list[Happened]) -> int:
    """Events, and the log-probabilities in them."""
    n = len(happened)
    for _, event in happened:
        logprobs = () if isinstance(event, Finish) else event.logprobs
        n += len(logprobs) * (1 + len(logprobs[0].top)) if logprobs else 0
    return n


async def _beside(numbers: int, work: Callable[[], _T]) -> _T:
    """What `work` returns; on another thread where it takes long."""
    return await asyncio.to_thread(work) if numbers > _MANY else work()


def _event(value: dict[str, Any]) -> bytes:
    return b'data: ' + to_json(value) + b'\n\n'

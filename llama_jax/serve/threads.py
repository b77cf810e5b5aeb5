"""Work that takes long, perhaps for ever, on threads of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from llama_jax.engine.queue import FairQueue

_T = TypeVar('_T')


class TooManyError(Exception):
    """So many wait already that one more is to come back later."""


@dataclass(frozen=True, eq=False)
class _Waiter:
    owner: str
    granted: asyncio.Future[None]


class Threads:
    """At most so many at a time; who waits for a place gets it in turns of their owners. A thread
    cannot be stopped: one that does not end keeps its place, and holds up neither other work nor
    the end of the process."""

    def __init__(self, most: int):
        self._most = self._free = most
        self._waiting: FairQueue[_Waiter] = FairQueue()

    async def wait(self, owner: str, *, seconds: float, most: int | None = None) -> None:
        """For a place, which `run` then takes. Raises TimeoutError, and TooManyError where `most`
        wait already. A place that is not waited for any more goes to the next."""
        if self._free:
            self._free -= 1
            return
        if most is not None and not self._waiting.has_room(owner, most):
            raise TooManyError
        waiter = _Waiter(owner, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(seconds):
                await waiter.granted
        except BaseException:
            if waiter.granted.done() and not waiter.granted.cancelled():
                self._release()
            else:
                self._waiting.remove(lambda other: other is waiter)
            raise

    async def run(self, work: Callable[[], _T], *, seconds: float | None = None) -> _T:
        """What `work` returns or raises; TimeoutError when it takes longer. After `wait`."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()

        def told(value: Any, error: BaseException | None) -> None:
            self._release()
            if done.done():
                return
            if error is None:
                done.set_result(value)
            else:
                done.set_exception(error)

        def working() -> None:
            value, error = None, None
            try:
                value = work()
            except BaseException as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody asks
                loop.call_soon_threadsafe(told, value, error)

        threading.Thread(target=working, daemon=True).start()
        async with asyncio.timeout(seconds):
            return await done

    async def end(self, *, seconds: float) -> None:
        """Takes all places for good, of what runs when it has ended; TimeoutError where it does
        not. A process that ends while a thread computes may be killed instead."""
        async with asyncio.timeout(seconds):
            for _ in range(self._most):
                await self.wait('', seconds=seconds)

    def _release(self) -> None:
        while len(self._waiting):
            granted = self._waiting.pop().granted
            if not granted.done():  # who leaves is cancelled first, and takes itself out later
                granted.set_result(None)
                return
        self._free += 1

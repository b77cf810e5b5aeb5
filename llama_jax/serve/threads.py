"""Work that may take for ever, on threads of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar('_T')


class Threads:
    """At most so many at a time. A thread cannot be stopped: one that does not end keeps its place,
    and holds up neither other work nor the end of the process."""

    def __init__(self, most: int):
        self._free = asyncio.Semaphore(most)

    async def wait(self, *, seconds: float) -> None:
        """For a place, which `run` then takes. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            await self._free.acquire()

    async def run(self, work: Callable[[], _T], *, seconds: float) -> _T:
        """What `work` returns or raises; TimeoutError when it takes longer. After `wait`."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()

        def told(value: Any, error: BaseException | None) -> None:
            self._free.release()
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

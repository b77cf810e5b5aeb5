"""Connections that hold a place and ask for nothing: deadlines for headers and for readers, and how
many there may be.

uvicorn closes a connection that is silent after an answer, and no other: one that sends half a
header keeps its place for ever, and 1,000 of them are all the files that a process may open.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_jax.serve.errors import ApiError, to_json
from llama_jax.serve.feed import RETRY_SECONDS
from llama_jax.serve.gate import network_of

_OTHER_FILES = 128
"""That the process opens besides connections, at most."""
_FULL = to_json(
    ApiError(
        429, 'too many connections: close some, or use them again', code='too_many_connections'
    ).body()
)
_REFUSAL = (
    b'HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: %d\r\n'
    b'connection: close\r\ncontent-length: %d\r\n\r\n%s' % (RETRY_SECONDS, len(_FULL), _FULL)
)


@dataclass
class Connections:
    """Those of one server."""

    most: int
    """In all."""
    of_one: int
    """Of one address."""
    header_seconds: float = 15.0
    """From the first byte of a request to the end of its header; from the connection to its first
    request."""
    write_seconds: float = 30.0
    """In which a reader that is behind takes something of what waits for it."""
    _n: int = 0
    _of: Counter[str] = field(default_factory=Counter)
    _idle: dict[Connection, None] = field(default_factory=dict)
    """Those that ask for nothing, the longest first."""

    @classmethod
    def within(cls, files: int, **settings: Any) -> Connections:
        """As many as a process has that may open so many files: an address has a quarter."""
        most = max(1, files - _OTHER_FILES)
        return cls(most, min(1024, -(-most // 4)), **settings)

    def take(self, connection: Connection) -> bool:
        """A place for a new one. Where there is none, that which has asked for nothing for longest
        loses its own; False: all of them are at work."""
        address = connection.network
        for is_full, loses in (
            (self._of[address] >= self.of_one, lambda other: other.network == address),
            (self._n >= self.most, lambda other: True),
        ):
            if is_full:
                found = next((other for other in self._idle if loses(other)), None)
                if found is None:
                    return False
                found.drop()
        self._of[address] += 1
        self._n += 1
        return True

    def leave(self, connection: Connection) -> None:
        self._n -= 1
        self._of[connection.network] -= 1
        if not self._of[connection.network]:
            del self._of[connection.network]

    def idles(self, connection: Connection, idle: bool) -> None:
        if idle:
            self._idle[connection] = None
        else:
            self._idle.pop(connection, None)


class Connection(H11Protocol):
    """One of `connections`."""

    network = ''
    _held = False
    """It has a place."""
    _begun = False
    """Bytes of a request have come, and the end of its header has not."""

    def __init__(self, connections: Connections, config: Config, *args: Any, **settings: Any):
        super().__init__(config, *args, **settings)
        self._all = connections
        self._timers: dict[Literal['header', 'write'], asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.network = network_of(self.client[0] if self.client else '')
        self._held = self._all.take(self)
        if self._held:
            self._all.idles(self, True)
            self._limit('header', self._all.header_seconds)
        else:
            transport.write(_REFUSAL)
            transport.close()
            self._closes()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._leave()

    def data_received(self, data: bytes) -> None:
        if not self._held:
            return
        super().data_received(data)
        if self._asks():
            self._end('header')
            self._all.idles(self, False)
        elif not self._begun:
            self._begun = True
            self._limit('header', self._all.header_seconds)
        self._closes()

    def on_response_complete(self) -> None:
        self._begun = False
        super().on_response_complete()  # which begins the next request where it is there already
        if not self._asks():
            self._all.idles(self, True)
        self._closes()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._closes()

    def shutdown(self) -> None:
        super().shutdown()
        self._closes()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """Drop it once it has taken nothing for so long of what waits to be sent."""
        left = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < left:
                self._watch_reader()
            else:
                self.drop()

        self._limit('write', self._all.write_seconds, look)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end('write')
        self._closes()

    def drop(self) -> None:
        """Close it now, whatever waits to be sent."""
        self._leave()  # connection_lost comes later, and the place is free now
        self.transport.abort()

    def _leave(self) -> None:
        self._end('header')
        self._end('write')
        self._all.idles(self, False)
        if self._held:
            self._held = False
            self._all.leave(self)

    def _asks(self) -> bool:
        """It has a request that is not answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _closes(self) -> None:
        """A transport that is closed first sends what waits, to a reader that may never take it."""
        if self.transport.is_closing() and 'write' not in self._timers:
            self._watch_reader()

    def _limit(
        self,
        what: Literal['header', 'write'],
        seconds: float,
        then: Callable[[], None] | None = None,
    ) -> None:
        self._end(what)
        self._timers[what] = self.loop.call_later(seconds, then or self.drop)

    def _end(self, what: Literal['header', 'write']) -> None:
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()

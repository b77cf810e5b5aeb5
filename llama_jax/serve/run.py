"""The server process: a socket, and an end in which no stream is left hanging."""

from __future__ import annotations

import asyncio
import functools
import resource
import socket

import uvicorn
from starlette.applications import Starlette

from llama_jax.errors import UserError
from llama_jax.serve.connections import Connection, Connections

GRACE_SECONDS = 10.0
"""From the signal to the end. Streams go on for most of it, then they are cut off."""
_BACKLOG = 2048
_FILES = 65_536
"""Files, connections among them, that a server has use for."""
_HELD = 1 << 18
"""Bytes of an answer that the system holds for a client, which it doubles."""
_LAST_PORT = 2**16 - 1


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises UserError when it cannot be had."""
    if not 0 <= port <= _LAST_PORT:
        raise UserError(f'--port {port} is none: choose one up to {_LAST_PORT}, 0 for a free one')
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        # Of connections too: what a slow reader takes is seen where the system holds little.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _HELD)
        return sock
    except (OSError, UnicodeError) as error:
        why = getattr(error, 'strerror', None) or error
        raise UserError(
            f'cannot listen on {host}:{port} ({why}): choose another --port or --host'
        ) from None


def open_files() -> int:
    """Raises the limit of open files, of which each connection is one, as far as it goes and is of
    use; what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= _FILES:
        return _FILES
    for wanted in (_FILES if hard == unlimited else min(hard, _FILES), 10_240):
        if wanted > soft:
            try:  # macOS refuses what its kernel does not have, whatever the limit says
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return wanted
            except (OSError, ValueError):
                continue
    return soft


class Server(uvicorn.Server):
    """Serves an application of `app.build` until a signal; `run(sockets=[bind(...)])`."""

    def __init__(
        self,
        app: Starlette,
        *,
        connections: Connections | None = None,
        grace_seconds: float = GRACE_SECONDS,
    ):
        """`connections`: how many there may be, and how long they may take. Default: as many as
        the process may open files."""
        self.connections = connections or Connections.within(open_files())
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(Connection, self.connections),  # type: ignore[arg-type]
                ws='none',
                log_level='warning',
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(grace_seconds)),
                timeout_keep_alive=30,
            )
        )
        self._service = app.state.service
        self._grace = grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Streams go on for most of the grace, then they are told that they are cut off; whoever
        does not even read that is dropped."""
        self._service.closing = True
        later = asyncio.get_running_loop().call_later
        timers = [
            later(0.8 * self._grace, self._service.close_streams),
            later(0.9 * self._grace, self._drop_all),
        ]
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()

    def _drop_all(self) -> None:
        for connection in list(self.server_state.connections):
            assert isinstance(connection, Connection)
            connection.drop()

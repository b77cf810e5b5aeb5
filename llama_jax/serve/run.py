"""The server process: a socket, and an end in which no stream is left hanging."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.applications import Starlette

from llama_jax.errors import UserError

GRACE_SECONDS = 10.0
"""From the signal to the end. Streams go on for most of it, then they are cut off."""
_BACKLOG = 2048
_LAST_PORT = 2**16 - 1


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises UserError when it cannot be had."""
    if not 0 <= port <= _LAST_PORT:
        raise UserError(f'--port {port} is none: choose one up to {_LAST_PORT}, 0 for a free one')
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        why = getattr(error, 'strerror', None) or error
        raise UserError(
            f'cannot listen on {host}:{port} ({why}): choose another --port or --host'
        ) from None


class Server(uvicorn.Server):
    """Serves an application of `app.build` until a signal; `run(sockets=[bind(...)])`."""

    def __init__(self, app: Starlette, *, grace_seconds: float = GRACE_SECONDS):
        super().__init__(
            uvicorn.Config(
                app,
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
        self._service.closing = True
        cut = asyncio.get_running_loop().call_later(0.8 * self._grace, self._service.close_streams)
        await super().shutdown(sockets)
        cut.cancel()

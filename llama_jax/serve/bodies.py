"""Bodies as they come in: how long, how slowly, and how many bytes of them at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from llama_jax.serve.body import shown
from llama_jax.serve.errors import ApiError
from llama_jax.serve.feed import full
from llama_jax.serve.served import Limits

_DRAINED = 16
"""Bodies that are too long are read, and dropped, up to so many times the limit: a client that is
still writing does not see the answer."""
_AT_A_TIME = 64
"""Longest bodies that are held at a time."""


class Bodies:
    """Those of one server."""

    def __init__(self, limits: Limits):
        self._limits, self._held = limits, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, which counts as held meanwhile. Raises ApiError when it is no JSON by its
        headers, too long or too slow, or others hold too many bytes."""
        kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
        if kind != 'application/json':
            raise ApiError(
                415,
                f"the content type is {shown(kind)}: send 'content-type: application/json'",
            )
        coding = request.headers.get('content-encoding', 'identity').lower()
        if coding != 'identity':
            raise ApiError(415, f'the content encoding is {shown(coding)}: send it plain')
        longest, data, length = self._limits.body_bytes, bytearray(), 0
        try:
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    async for piece in request.stream():
                        length += len(piece)
                        if length > longest * _DRAINED:
                            break
                        if length <= longest:
                            if self._held + len(piece) > longest * _AT_A_TIME:
                                raise full('the bodies of other requests take all memory')
                            self._held += len(piece)
                            data += piece
            except TimeoutError:
                seconds = self._limits.body_seconds
                raise ApiError(408, f'no whole body in {seconds:g} s: send faster') from None
            if length > longest:
                raise ApiError(413, f'the body is longer than {longest} bytes: send less')
            yield bytes(data)
        finally:
            self._held -= len(data)

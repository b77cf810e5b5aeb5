"""Pages of other origins that may ask the server, by the headers that browsers look for (CORS)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from llama_jax.errors import UserError

ANY = '*'
_ORIGIN = re.compile(r'[a-z][a-z0-9+.-]*://([^/\sA-Z:@?#*\[\]]+|\[[0-9a-f:.]+\])(:\d{1,5})?')


def check(origins: Sequence[str]) -> None:
    """Raises UserError for what no browser sends as an origin."""
    for origin in origins:
        if origin != ANY and not _ORIGIN.fullmatch(origin):
            raise UserError(
                f'--cors {origin} is no origin: give SCHEME://HOST or SCHEME://HOST:PORT in lower '
                f"case without a path, such as https://example.org, or '{ANY}' for any"
            )


def allow(app: Starlette, origins: Sequence[str]) -> None:
    """Pages of these origins may ask for all that the API has, with a key but without cookies."""
    check(origins)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=tuple(origins),
        allow_methods=('GET', 'POST'),
        allow_headers=('*',),
        allow_private_network=True,  # a page of the web may ask a server on this machine
        expose_headers=('Retry-After',),
    )

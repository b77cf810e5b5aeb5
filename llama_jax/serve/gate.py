"""What every request passes: the API key, the end of the server, and the counts."""

from __future__ import annotations

import hmac
import ipaddress
import time
from typing import Literal, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.serve.errors import CLIENT_GONE, ApiError
from llama_jax.serve.metrics import Metrics

_OWNER = 'llama_jax.owner'

Status = Literal['ok', 'closing', 'stopped']
_REFUSED = {
    'closing': ('the server is shutting down: try again', 'shutting_down'),
    'stopped': (
        'the engine has stopped: its log tells why, start the server again',
        'engine_stopped',
    ),
}


class Counts(Protocol):
    """What the gate needs of the service."""

    metrics: Metrics

    @property
    def status(self) -> Status:
        """Of the server and its engine."""


class Gate:
    """ASGI middleware. Paths under /v1, and those of the tokenizer, need one of `keys`, where there
    are any."""

    def __init__(self, app: ASGIApp, *, service: Counts, keys: tuple[str, ...]):
        self._app, self._service = app, service
        self._keys = tuple(key.encode('utf-8') for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), CLIENT_GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
            await send(message)

        try:
            refusal = self._refusal(scope)
            await (refusal.response() if refusal else self._app)(scope, receive, counted)
        except Exception:
            status = 500  # which Starlette answers, outside of this
            raise
        finally:
            self._service.metrics.answered(
                _method(scope), _path(scope), status, time.perf_counter() - begin
            )

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Also writes down whose request it is."""
        client = scope.get('client')
        scope[_OWNER] = network_of(client[0]) if client else ''
        if not scope['path'].startswith('/v1/') and scope['path'] not in _TOKENIZER:
            return None
        if self._keys:
            place = self._key(scope)
            if place is None:
                return ApiError(
                    401,
                    "no valid API key: send 'Authorization: Bearer KEY'",
                    code='invalid_api_key',
                    headers={'WWW-Authenticate': 'Bearer'},
                )
            scope[_OWNER] = f'key {place}'
        if (status := self._service.status) != 'ok':
            message, code = _REFUSED[status]
            return ApiError(503, message, code=code)
        return None

    def _key(self, scope: Scope) -> int | None:
        """Which of the keys was sent; all are compared, so that time tells nothing."""
        given = dict(scope['headers']).get(b'authorization', b'')
        scheme, _, key = given.partition(b' ')
        if scheme.lower() != b'bearer':
            return None
        same = [hmac.compare_digest(key.strip(), one) for one in self._keys]
        return same.index(True) if any(same) else None


def owner_of(scope: Scope) -> str:
    """Whose request it is, for turns at the engine: that of a key, else of an address."""
    return scope[_OWNER]


def network_of(address: str) -> str:
    """Whose an address is: of IPv6 everybody has 2^64."""
    try:
        ip = ipaddress.ip_address(address.partition('%')[0])
    except ValueError:
        return address
    if ip.version == 4:
        return address
    if ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))


def _method(scope: Scope) -> str:
    """Few, whatever is sent."""
    method = scope['method']
    return method if method in ('GET', 'HEAD', 'POST') else 'other'


def _path(scope: Scope) -> str:
    """The route, or 'other'."""
    path = scope['path']
    if path.startswith('/v1/models/'):
        return '/v1/models/{name}'
    return path if path in _PATHS else 'other'


_TOKENIZER = {'/tokenize', '/detokenize', '/tokenizer_info'}
_PATHS = {
    *_TOKENIZER,
    *('/', '/page.css', '/page.js', '/tokens.js', '/health', '/metrics'),
    *('/v1/models', '/v1/completions', '/v1/chat/completions', '/v1/embeddings'),
}

"""Errors of the API, in the shape that OpenAI's clients read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from starlette.responses import Response

_TYPES = {401: 'authentication_error', 429: 'rate_limit_error'}
CLIENT_GONE = 499
"""Nobody reads this answer; it is what the metrics show."""


class ApiError(Exception):
    """Becomes an answer with this status; `param` names the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(
            self.status, 'server_error' if self.status >= 500 else 'invalid_request_error'
        )
        return {
            'error': {
                'message': self.message,
                'type': kind,
                'param': self.param,
                'code': self.code,
            }
        }

    def response(self) -> Response:
        return json_response(self.body(), status=self.status, headers=self.headers)


def to_json(value: Any) -> bytes:
    """UTF-8 without escapes, but for lone surrogates, which only an escape can say."""
    return _text(value).encode('utf-8', 'backslashreplace')


def to_json_in_parts(value: Any) -> bytes:
    """The same, for large values and on another thread: one call of the library holds Python's lock
    until it has written all."""
    return ''.join(_parts(value)).encode('utf-8', 'backslashreplace')


def _parts(value: Any) -> Iterator[str]:
    """Objects and arrays of objects are taken apart."""
    is_object = isinstance(value, dict)
    if not value or not (is_object or (isinstance(value, list) and isinstance(value[0], dict))):
        yield _text(value)
        return
    between = '{' if is_object else '['
    for item in value.items() if is_object else value:
        yield between
        if is_object:
            name, item = item
            yield f'{_text(name)}:'
        yield from _parts(item)
        between = ','
    yield '}' if is_object else ']'


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(',', ':'), allow_nan=False)


def json_response(
    value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return _response(to_json(value), status, headers)


async def large_response(make: Callable[[], Any]) -> Response:
    """Of what `make` makes, beside everything else."""
    return _response(await asyncio.to_thread(lambda: to_json_in_parts(make())), 200, None)


def _response(data: bytes, status: int, headers: Mapping[str, str] | None) -> Response:
    return Response(data, status, headers, media_type='application/json')

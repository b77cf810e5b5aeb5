"""Errors of the API, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    text = json.dumps(value, ensure_ascii=False, separators=(',', ':'), allow_nan=False)
    return text.encode('utf-8', 'backslashreplace')


def json_response(
    value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(to_json(value), status, headers, media_type='application/json')

"""Calls an application in this process, without a socket."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()['error']

    @property
    def events(self) -> list[Any]:
        """Of a stream that ended as it should."""
        parts = [part for part in self.body.decode().split('\n\n') if not part.startswith(':')]
        assert parts.pop() == '' and all(part.startswith('data: ') for part in parts)
        assert parts.pop() == 'data: [DONE]'
        return [json.loads(part[6:]) for part in parts]


async def call(
    app,
    method: str,
    path: str,
    body: Any = b'',
    *,
    headers: dict[str, str] | None = None,
    leave_after: int | None = None,
    whole: bool = True,
) -> Answer:
    """`body` is bytes, or an object to be sent as JSON. The client leaves after so many pieces of
    the answer (0: at once). A body that is not `whole` never ends."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {'content-type': 'application/json', **(headers or {})}
    scope = {
        'type': 'http',
        'asgi': {'version': '3.0'},
        'http_version': '1.1',
        'method': method,
        'scheme': 'http',
        'path': path,
        'raw_path': path.encode(),
        'query_string': b'',
        'root_path': '',
        'headers': [(k.lower().encode(), v.encode('latin-1')) for k, v in sent.items()],
        'client': ('192.0.2.1', 1),
        'server': ('localhost', 80),
    }
    left = asyncio.Event()
    given, pieces, answer = False, 0, Answer(0, {}, b'')
    if leave_after == 0:
        left.set()

    async def receive():
        nonlocal given
        if not given:
            given = True
            return {'type': 'http.request', 'body': data, 'more_body': not whole}
        await left.wait()
        return {'type': 'http.disconnect'}

    async def send(message):
        nonlocal pieces
        if message['type'] == 'http.response.start':
            answer.status = message['status']
            answer.headers = {k.decode(): v.decode('latin-1') for k, v in message['headers']}
            return
        answer.body += message.get('body', b'')
        pieces += 1
        if not message.get('more_body') or pieces == leave_after:
            left.set()
        await asyncio.sleep(0)

    await app(scope, receive, send)
    return answer


def post(app, path: str, body: Any, **settings) -> Answer:
    """One call, in a loop of its own."""
    return asyncio.run(call(app, 'POST', path, body, **settings))


def get(app, path: str, **settings) -> Answer:
    return asyncio.run(call(app, 'GET', path, **settings))

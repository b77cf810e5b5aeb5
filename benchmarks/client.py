"""A bare client of HTTP: the load of a benchmark is the server, not a library."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit


async def get(url: str, path: str) -> str:
    """The body of an answer."""
    reader, writer = await request(url, 'GET', path)
    status, headers = await head(reader)
    assert status == 200, status
    body = await reader.readexactly(int(headers['content-length']))
    writer.close()
    return body.decode()


async def request(
    url: str, method: str, path: str, body: object = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the request is sent."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    data = json.dumps(body).encode() if body is not None else b''
    lines = [
        f'{method} {path} HTTP/1.1',
        f'host: {parts.netloc}',
        'connection: close',
        *(['content-type: application/json', f'content-length: {len(data)}'] if data else []),
    ]
    key = os.environ.get('LLAMA_JAX_API_KEYS', '').split(',')[0]
    lines += [f'authorization: Bearer {key}'] * bool(key)
    writer.write('\r\n'.join(lines).encode() + b'\r\n\r\n' + data)
    await writer.drain()
    return reader, writer


async def head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers."""
    status = int((await reader.readline()).split()[1])
    headers = {}
    while (line := await reader.readline()).strip():
        name, _, value = line.decode().partition(':')
        headers[name.lower()] = value.strip()
    return status, headers


async def choices(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """What comes of a stream of one choice, up to its end."""
    while line := await reader.readline():
        if line == b'data: [DONE]\n':
            return
        if line.startswith(b'data: '):
            yield from_line(line)
    raise AssertionError('the stream broke off')


def from_line(line: bytes) -> dict[str, Any]:
    """The choice in an event."""
    (choice,) = json.loads(line[6:])['choices']
    return choice

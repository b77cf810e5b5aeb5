"""Turns at a server: what others cost a short prompt and a running stream, and what free rows cost
one that is alone. A part of benchmarks/serve.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from benchmarks import client

SHORT = 32
"""Tokens of a short prompt."""
STREAM = 64
"""Tokens of a stream that is measured."""


async def measure(url: str, alone_url: str, rounds: int) -> dict[str, Any]:
    """Ratios, medians of some rounds, each to the time of the same request alone in the same round.
    `alone_url` is a server of the same model with one row."""
    model = json.loads(await client.get(url, '/v1/models'))['data'][0]
    long = model['length'] - 2 * STREAM
    rng = np.random.default_rng(0)

    def prompt(n: int) -> list[int]:
        """Another one each time, so that none is read already."""
        return rng.integers(5, model['vocabulary'], n).tolist()

    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        one = await _round(url, alone_url, model['id'], long, prompt)
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return {name: round(float(np.median(values)), 3) for name, values in found.items()} | {
        'long_prompt': long,
        'short_prompt': SHORT,
        'rounds': rounds,
    }


async def _round(
    url: str, alone_url: str, model: str, long: int, prompt: Callable[[int], list[int]]
) -> dict[str, float]:
    def asks(where: str, n_prompt: int, n: int) -> asyncio.Task[list[float]]:
        return asyncio.create_task(_times(where, model, prompt(n_prompt), n))

    first = (await asks(url, SHORT, 1))[0]
    one_row = _speed(await asks(alone_url, SHORT, STREAM))
    many_rows = _speed(await asks(url, SHORT, STREAM))

    reading = asks(url, long, 1)
    await asyncio.sleep(first)
    behind = (await asks(url, SHORT, 1))[0]
    await reading

    begin = time.perf_counter()
    async with contextlib.aclosing(_tokens(url, model, prompt(SHORT), long - SHORT)) as running:
        await anext(running)
        reading, n = asks(url, long, 1), 0
        begin = time.perf_counter()
        async for _ in running:
            n += 1
            if reading.done():
                break
        beside = n / (time.perf_counter() - begin)
    await reading
    return {
        'first_token_behind_a_long_prompt': behind / first,
        'speed_alone_of_that_with_one_row': many_rows / one_row,
        'speed_while_a_long_prompt_is_read': beside / many_rows,
        'first_token_alone_seconds': first,
        'tokens_per_second_alone': many_rows,
    }


async def _times(url: str, model: str, prompt: list[int], n: int) -> list[float]:
    """Seconds until each token of an answer."""
    begin = time.perf_counter()
    return [time.perf_counter() - begin async for _ in _tokens(url, model, prompt, n)]


async def _tokens(url: str, model: str, prompt: list[int], n: int) -> AsyncIterator[None]:
    """Once for each token, when it comes."""
    body = {
        **{'model': model, 'prompt': prompt, 'max_tokens': n, 'temperature': 0},
        **{'stream': True, 'ignore_eos': True, 'logprobs': 0},
    }
    reader, writer = await client.request(url, 'POST', '/v1/completions', body)
    try:
        status, _ = await client.head(reader)
        assert status == 200, (status, await reader.read())
        async for choice in client.choices(reader):
            for _ in choice['logprobs']['tokens'] if choice['logprobs'] else ():
                yield
    finally:
        writer.close()


def _speed(times: list[float]) -> float:
    """Tokens in a second, after the first."""
    return (len(times) - 1) / (times[-1] - times[0])


def report(figures: dict[str, Any]) -> None:
    """One line each."""
    for name, value in figures.items():
        print(f'  {name.replace("_", " "):36s} {value:8.2f}')

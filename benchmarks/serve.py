"""A server under load: `python -m benchmarks.serve --checkpoint runs/quickstart`.

Many clients at once stream completions of mixed length; a third of them hang up in the midst. Told
are the times that a reader feels, in milliseconds: to the first token, and between tokens. After
each round every row has to be free again, and from the second round on memory may not grow: else
the benchmark fails. Starts a server of its own, or loads the one at --url. With --turns it tells
as well what long prompts cost others, and free rows one that is alone; --rounds 0: only that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import client, turns
from benchmarks.text import token_rows
from experiments import cli
from llama_jax.errors import UserError

IDLE_SECONDS = 30.0
GROWTH_BYTES = 32 << 20
"""Of the server's memory, between the second round and the last."""


@dataclass(frozen=True)
class Options:
    checkpoint: str | None = None
    """RUN, RUN@STEP or RUN@best, to be served for this benchmark; or --weights, or --url."""
    weights: str | None = None
    url: str | None = None
    """A server that runs already, such as http://127.0.0.1:8000."""
    clients: int = 200
    rounds: int = 4
    """Streams of each client, one after the other; the first round is not measured."""
    prompt: tuple[int, int] = (4, 200)
    """Tokens of a prompt, from and to."""
    tokens: tuple[int, int] = (8, 64)
    """Tokens to generate, from and to."""
    rows: int = 8
    length: int = 512
    turns: int = 0
    """Rounds in which turns are measured (benchmarks/turns.py), beside a server of one row."""
    alone: str | None = None
    """That server, if --url is given."""
    json: Path | None = None


@dataclass
class Times:
    """Of all streams, in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    """One for each token after a stream's first piece: tokens that come together share the time."""
    pieces: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    refused: int = 0


def main(options: Options) -> None:
    if options.turns and options.url and not options.alone:
        raise UserError('--turns compares with a server of one row: give it by --alone')
    with contextlib.ExitStack() as servers:
        url = options.url or servers.enter_context(server(options, options.rows))
        figures: dict[str, Any] = {}
        if options.turns:
            alone = options.alone or servers.enter_context(server(options, 1))
            figures['turns'] = asyncio.run(turns.measure(url, alone, options.turns))
            turns.report(figures['turns'])
        if options.rounds:
            figures |= asyncio.run(load(options, url))
            report(figures)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + '\n', encoding='utf-8')


@contextlib.contextmanager
def server(options: Options, rows: int) -> Iterator[str]:
    """Address of a server that is started for it."""
    what = ('--checkpoint', options.checkpoint) if options.checkpoint else (
        ('--weights', options.weights) if options.weights else None
    )  # fmt: skip
    if what is None:
        raise UserError('nothing to load: give --checkpoint, --weights or --url')
    sizes = ('--rows', rows, '--length', options.length, '--queue', 2 * options.clients)
    command = [sys.executable, '-m', 'experiments.serve', '--port', 0, *what, *sizes]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        for line in process.stderr:
            print(line, end='', file=sys.stderr)
            found = re.search(r'http://\S+:\d+', line)
            if found:
                break
        else:
            raise UserError('the server did not start')
        rest = threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True)
        rest.start()
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


async def load(options: Options, url: str) -> dict:
    model = json.loads(await client.get(url, '/v1/models'))['data'][0]
    longest = options.prompt[1]
    rows = token_rows(options.clients, longest, model['vocabulary'])
    times, seconds, memory = Times(), 0.0, []
    for turn in range(options.rounds):
        if turn == 1:
            times, seconds = Times(), 0.0
        rng, begin = random.Random(turn), time.perf_counter()
        streams = []
        for i in range(options.clients):
            n = min(rng.randint(*options.tokens), model['length'] - 1)
            prompt = rows[i, : min(rng.randint(*options.prompt), model['length'] - n)].tolist()
            leave = rng.uniform(0, 1) * n if i % 3 == 0 else None
            streams.append(stream(url, model['id'], prompt, n, i, leave, times))
        await asyncio.gather(*streams)
        seconds += time.perf_counter() - begin
        memory.append(await idle(url))
        print(f'round {turn}: {time.perf_counter() - begin:.1f} s', file=sys.stderr)
    grown = None
    if len(memory) > 2 and None not in memory:
        grown = memory[-1] - memory[1]
        assert grown < GROWTH_BYTES, f'memory grew by {grown >> 20} MB: {memory}'
    return {
        'command': 'python -m benchmarks.serve',
        'model': model['id'],
        'cores': os.cpu_count(),
        'clients': options.clients,
        'streams': options.clients * max(1, options.rounds - 1),
        'seconds': seconds,
        'tokens_per_second': times.tokens / seconds,
        'ends': dict(times.ends),
        'told_to_come_back': times.refused,
        'milliseconds': {
            'first token': percentiles(times.first),
            'between tokens': percentiles(times.between),
            'between pieces': percentiles(times.pieces),
            'whole answer': percentiles(times.whole),
        },
        'resident_megabytes': [m and m >> 20 for m in memory],
        'grown_megabytes': grown and grown / (1 << 20),
    }


async def stream(
    url: str, model: str, prompt: list[int], n: int, seed: int, leave: float | None, times: Times
) -> None:
    """One client: asks, reads, and hangs up after `leave` tokens."""
    body = {
        **{'model': model, 'prompt': prompt, 'max_tokens': n, 'seed': seed, 'temperature': 0.8},
        **{'stream': True, 'ignore_eos': True, 'logprobs': 0},  # which tell how many came
    }
    begin = time.perf_counter()
    while True:
        reader, writer = await client.request(url, 'POST', '/v1/completions', body)
        try:
            status, headers = await client.head(reader)
            if status == 429:
                times.refused += 1
                await asyncio.sleep(float(headers['retry-after']))
                continue
            assert status == 200, (status, await reader.read())
            await read(reader, begin, leave, times)
            return
        finally:
            writer.close()


async def read(
    reader: asyncio.StreamReader, begin: float, leave: float | None, times: Times
) -> None:
    last, got = begin, 0
    async for choice in client.choices(reader):
        now = time.perf_counter()
        if choice['finish_reason']:
            times.ends[choice['finish_reason']] += 1
        count = len(choice['logprobs']['tokens']) if choice['logprobs'] else 0
        if not count:
            continue
        if got:
            times.pieces.append(now - last)
            times.between += [(now - last) / count] * count
        else:
            times.first.append(now - begin)
        last = now
        got += count
        times.tokens += count
        if leave is not None and got >= leave:
            times.ends['hung up'] += 1
            return
    times.whole.append(time.perf_counter() - begin)


async def idle(url: str) -> int | None:
    """Waits until no row is taken; memory of the server then, where it tells."""
    until = time.perf_counter() + IDLE_SECONDS
    while True:
        lines = (await client.get(url, '/metrics')).splitlines()
        values = dict(line.rsplit(' ', 1) for line in lines if not line.startswith('#'))
        taken = [int(values[f'llama_jax_{name}']) for name in ('rows_busy', 'waiting')]
        if not any(taken):
            resident = values.get('process_resident_memory_bytes')
            return int(resident) if resident else None
        assert time.perf_counter() < until, f'rows leaked: {taken} are busy and waiting'
        await asyncio.sleep(0.05)


def percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.array(seconds or [np.nan]) * 1e3
    return {f'p{p}': round(float(np.percentile(values, p)), 2) for p in (50, 90, 99)}


def report(figures: dict) -> None:
    print(
        f'{figures["clients"]} clients at once, {figures["streams"]} streams in '
        f'{figures["seconds"]:.1f} s, {figures["tokens_per_second"]:.0f} tokens/s; ends: '
        + ', '.join(f'{name} {n}' for name, n in sorted(figures['ends'].items()))
    )
    for name, of in figures['milliseconds'].items():
        print(f'  {name:15s} ' + '  '.join(f'{p} {value:8.1f} ms' for p, value in of.items()))
    print(f'  memory of the server, MB: {figures["resident_megabytes"]}')


if __name__ == '__main__':
    cli.main(lambda: main(cli.options(Options, 'benchmarks.serve', __doc__)))

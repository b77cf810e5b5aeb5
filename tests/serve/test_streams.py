"""Many streams at once, and clients that leave: no row is left behind, nothing piles up."""

import asyncio
import gc
import random

import pytest

from llama_jax.serve.metrics import resident_bytes
from tests.serve.asgi import call, post


@pytest.mark.slow
def test_two_hundred_streams_a_third_cut_off(app):
    made = app(rows=8, queue=400, length=512)
    engine = made.state.service.served.engine
    rng = random.Random(0)

    async def one(i):
        prompt, n = '字🙂é.'[i % 4] * rng.randint(1, 40), rng.randint(1, 60)
        body = {'prompt': prompt, 'max_tokens': n, 'stream': True}
        leave = rng.randint(0, 5) if i % 3 == 0 else None
        answer = await call(made, 'POST', '/v1/completions', body, leave_after=leave)
        if leave is None:
            events = answer.events
            assert answer.status == 200 and events[-1]['choices'][0]['finish_reason'] == 'length'
            text = ''.join(event['choices'][0]['text'] for event in events)
            whole = (prompt.encode() * n)[:n].decode(errors='ignore')
            assert text.rstrip('\ufffd') == whole

    async def rounds():
        sizes = []
        for _ in range(4):
            await asyncio.gather(*(one(i) for i in range(200)))
            gc.collect()
            sizes.append(resident_bytes())
        return sizes

    sizes = asyncio.run(rounds())
    assert engine.idle()
    assert not made.state.service._feeds
    stats = engine.stats()
    assert sum(stats.requests_total.values()) == 800 and stats.requests_total['cancelled'] > 100
    if sizes[0] is not None:
        assert sizes[-1] - sizes[1] < 8 << 20, [size >> 20 for size in sizes]


def test_client_that_leaves_frees_all_its_rows(app):
    made = app(rows=2, pause=0.002)
    engine = made.state.service.served.engine
    body = {'prompt': 'a', 'max_tokens': 500, 'n': 5}
    for stream in (True, False):
        for leave in (0, 2) if stream else (0,):
            answer = post(made, '/v1/completions', {**body, 'stream': stream}, leave_after=leave)
            assert answer.status in (200, 499)
            assert engine.idle(1.0), engine.stats()
    assert engine.stats().requests_total == {'cancelled': 15}


def test_waiting_clients_are_kept_on_the_line(app, monkeypatch):
    from llama_jax.serve import feed

    monkeypatch.setattr(feed, 'KEEP_ALIVE_SECONDS', 0.02)
    body = {'prompt': 'a', 'max_tokens': 3, 'stream': True}
    answer = post(app(pause=0.1), '/v1/completions', body)
    assert b': waiting\n\n' in answer.body and len(answer.events) == 4

"""Many streams at once, and clients that leave: no row is left behind, nothing piles up."""

import asyncio
import gc
import json
import random
import socket
import threading

import pytest

from llama_jax.serve import answers, feed
from llama_jax.serve.metrics import resident_bytes
from llama_jax.serve.responses import Reply
from tests.serve import fake
from tests.serve.asgi import call, post
from tests.serve.conftest import running


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
    # One that leaves while its rows are handed over has no more of them than that.
    (total,) = engine.stats().requests_total.items()
    assert total[0] == 'cancelled' and 10 < total[1] <= 15


def test_waiting_clients_are_kept_on_the_line(app, monkeypatch):
    monkeypatch.setattr(feed, 'KEEP_ALIVE_SECONDS', 0.02)
    body = {'prompt': 'a', 'max_tokens': 3, 'stream': True}
    answer = post(app(pause=0.1), '/v1/completions', body)
    assert b': waiting\n\n' in answer.body and len(answer.events) == 4


def test_each_piece_is_sent_before_the_next_one_is_drawn(app):
    # Every token but the first is drawn when the client has the one before.
    have = threading.Semaphore(1)

    def script(request):
        for byte in b'abcdef':
            assert have.acquire(timeout=10)
            yield byte
        yield fake.EOS

    made = app(script=script)
    body = json.dumps({'prompt': 'a', 'stream': True}).encode()
    head = f'POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n'
    with running(made) as (url, _), socket.socket() as client:
        client.settimeout(5)
        client.connect(('127.0.0.1', int(url.rpartition(':')[2])))
        client.sendall(head.encode() + b'content-type: application/json\r\n\r\n' + body)
        got = b''
        for char in 'abcdef':
            while f'"text":"{char}"'.encode() not in got:
                got += client.recv(1 << 16)
            have.release()
        while b'[DONE]' not in got:
            got += client.recv(1 << 16)


def test_what_waits_for_a_slow_reader_is_bounded(app, monkeypatch):
    monkeypatch.setattr(feed, 'BEHIND', 20)
    made = app(length=4000, pause=0.0005)
    engine = made.state.service.served.engine
    body = {'prompt': 'a', 'max_tokens': 3000, 'stream': True}
    read = []

    async def reads_nothing_for_long(scope, receive, send):
        async def slow(message):
            if len(read) == 3:
                while not engine.stats().requests_total:
                    await asyncio.sleep(0.01)
            read.append(message)
            await send(message)

        await made(scope, receive, slow)

    answer = post(reads_nothing_for_long, '/v1/completions', body)
    assert engine.stats().requests_total == {'cancelled': 1}
    last = json.loads(answer.body.rpartition(b'data: ')[2])
    assert last['error']['code'] == 'slow_reader' and 'read faster' in last['error']['message']
    assert engine.stats().generated_tokens_total < 3000
    assert 20 <= answer.body.count(b'"text":"a"') + answer.body.count(b'aa') < 200


def test_a_slow_server_is_not_taken_for_a_slow_reader(app, monkeypatch):
    # What is large is written on a thread, and many events may come meanwhile.
    monkeypatch.setattr(feed, 'BEHIND', 20)
    monkeypatch.setattr(answers, '_MANY', 0)
    made = app(length=4000)
    engine = made.state.service.served.engine
    plain, first = Reply.chunks, []

    def chunks(self, index, event):
        if not first:
            first.append(event)
            assert engine.idle()
        return plain(self, index, event)

    monkeypatch.setattr(Reply, 'chunks', chunks)
    for stream in (True, False):
        first.clear()
        body = {'prompt': 'a', 'max_tokens': 300, 'stream': stream}
        answer = post(made, '/v1/completions', body)
        last = answer.events[-1] if stream else answer.json()
        assert last['choices'][0]['finish_reason'] == 'length'

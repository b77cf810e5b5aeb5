"""Embeddings under load: turns, deadlines, clients that are gone, and the place of each text."""

import asyncio
import threading

import numpy as np
import pytest

from llama_jax.generate.finite import NotFiniteError
from tests.serve import fake
from tests.serve.asgi import call, post

PATH = '/v1/embeddings'
PLAIN = fake.FakeEngine.embed


class Gated(fake.FakeEngine):
    """Embeds a call at a time, each when it is let through; tells what it was asked."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.calls, self.inside, self.most = [], 0, 0
        self.gate = threading.Semaphore(0)

    def embed(self, prompts):
        self.calls.append([bytes(prompt).decode() for prompt in prompts])
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.gate.acquire(timeout=10)
        self.inside -= 1
        return super().embed(prompts)

    async def asked(self, n):
        """Waits until it has been asked so many times."""
        async with asyncio.timeout(10):
            while len(self.calls) < n:
                await asyncio.sleep(0.002)


@pytest.fixture
def made(app, monkeypatch):
    monkeypatch.setattr(fake, 'FakeEngine', Gated)

    def make(**limits):
        one = app(keys=('a', 'b'), limits=fake.Limits(**limits))
        return one, one.state.service.served.engine

    return make


def ask(app, texts, key='a', **body):
    headers = {'authorization': f'Bearer {key}'}
    leaves = body.pop('leave_after', None)
    return call(app, 'POST', PATH, {'input': texts, **body}, headers=headers, leave_after=leaves)


def vector(answer, i=0):
    return np.array(answer.json()['data'][i]['embedding'], np.float32)


def test_one_at_a_time_and_so_many_wait(made):
    app, engine = made(embeddings_waiting=4)

    async def several():
        asked = [asyncio.create_task(ask(app, 'x')) for _ in range(6)]
        while sum(task.done() for task in asked) < 2:
            await asyncio.sleep(0.002)
        engine.gate.release(6)
        return sorted([answer.status for answer in await asyncio.gather(*asked)])

    # One is computed and three wait; the last place is for owners with less.
    assert asyncio.run(several()) == [200, 200, 200, 200, 429, 429] and engine.most == 1


def test_owners_take_turns_after_every_few_texts(made):
    app, engine = made()

    async def several():
        many = asyncio.create_task(ask(app, [f'{i:02}' for i in range(17)]))
        await engine.asked(1)
        few = asyncio.create_task(ask(app, ['few'], key='b'))
        await asyncio.sleep(0.02)
        engine.gate.release(4)
        return await many, await few

    many, few = asyncio.run(several())
    assert [len(texts) for texts in engine.calls] == [8, 1, 8, 1] and engine.calls[1] == ['few']
    for i in range(17):
        one = PLAIN(engine, [list(f'{i:02}'.encode())])[0]
        np.testing.assert_allclose(vector(many, i), one, rtol=1e-6)
    assert few.status == 200


def test_texts_of_unlike_length_come_back_in_their_order(made):
    app, engine = made()
    engine.gate.release(3)
    texts = ['a' * (1 + i * 7 % 20) for i in range(20)]
    answer = asyncio.run(ask(app, texts))
    assert [len(text) for call in engine.calls for text in call] == sorted(map(len, texts))
    for i, text in enumerate(texts):
        expected = PLAIN(engine, [list(text.encode())])[0]
        np.testing.assert_allclose(vector(answer, i), expected, rtol=1e-6)


@pytest.mark.parametrize('place', ['at work', 'waiting'])
def test_client_that_is_gone_is_dropped(made, place):
    app, engine = made()

    async def several():
        other = asyncio.create_task(ask(app, ['other'], key='b')) if place == 'waiting' else None
        if other:
            await engine.asked(1)
        answer = await ask(app, ['gone'] * 40, leave_after=0)
        engine.gate.release(2)
        if other:
            assert (await other).status == 200
        assert (await ask(app, ['next'])).status == 200
        return answer

    assert asyncio.run(several()).status == 499
    gone = [texts for texts in engine.calls if 'gone' in texts]
    assert len(gone) == (place == 'at work')


def test_deadline(made):
    app, engine = made()

    async def several():
        late = asyncio.create_task(ask(app, ['late'] * 20, timeout=0.1))
        await engine.asked(1)
        queued = await ask(app, ['queued'], key='b', timeout=0.05)
        answer = await late
        engine.gate.release(2)
        return answer, queued, await ask(app, ['next'])

    late, queued, after = asyncio.run(several())
    for answer, n in ((late, 20), (queued, 1)):
        assert answer.status == 504 and answer.error['code'] == 'deadline'
        assert f'0 of {n} texts' in answer.error['message']
    assert after.status == 200 and engine.calls == [['late'] * 8, ['next']]


def test_the_text_at_fault_is_named_by_its_place_among_all(app, monkeypatch):
    made = app()
    engine = made.state.service.served.engine

    def fails(prompts):
        for i, prompt in enumerate(prompts):
            if bytes(prompt) == b'bad':
                raise NotFiniteError(f'text {i}: the model gives NaN or infinity')
        return fake.FakeEngine.embed(engine, prompts)

    monkeypatch.setattr(engine, 'embed', fails)
    answer = post(made, PATH, {'input': ['a', 'bad', 'b']})
    assert answer.status == 500 and answer.error['message'].startswith('text 1: ')
    body = {'input': ['long text'] * 5 + ['bad']}
    assert post(made, PATH, body).error['message'].startswith('text 5: ')

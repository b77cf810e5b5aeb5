"""Long work beside the event loop: turns, places that come back, and bodies that hold up nobody."""

import asyncio
import json
import threading
import time

import pytest

from llama_jax.serve import bodies, body, errors, responses, schema
from llama_jax.serve.errors import ApiError
from llama_jax.serve.threads import Threads, TooManyError
from tests.serve import fake
from tests.serve.asgi import call, post


def ticks_while(work) -> int:
    """How often another thread gets its turn meanwhile."""
    done, n = threading.Event(), 0

    def tick():
        nonlocal n
        while not done.is_set():
            time.sleep(0.001)
            n += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = n
        work()
        return n - before
    finally:
        done.set()
        thread.join()


def test_places_go_round_by_owner():
    order = []

    async def one(threads, owner):
        await threads.wait(owner, seconds=10)
        await threads.run(lambda: order.append(owner))

    async def several():
        threads = Threads(1)
        await threads.wait('first', seconds=1)
        waiting = [asyncio.create_task(one(threads, owner)) for owner in 'aaabc']
        await asyncio.sleep(0)
        await threads.run(lambda: order.append('first'))
        await asyncio.gather(*waiting)

    asyncio.run(several())
    assert order == ['first', *'abcaa']


def test_who_leaves_or_is_late_gives_the_place_on():
    async def several():
        threads = Threads(1)
        await threads.wait('a', seconds=1)
        left = asyncio.create_task(threads.wait('b', seconds=10))
        granted = asyncio.create_task(threads.wait('c', seconds=10))
        last = asyncio.create_task(threads.wait('d', seconds=10))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(TimeoutError):
            await threads.wait('e', seconds=0.01)
        with pytest.raises(TooManyError):
            await threads.wait('d', seconds=1, most=2)
        threads._release()
        granted.cancel()  # in the moment in which its place comes
        await last
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 / 0)
        await threads.end(seconds=1)
        with pytest.raises(TimeoutError):
            await threads.wait('f', seconds=0.01)

    asyncio.run(several())


def test_who_leaves_as_a_place_comes_free_loses_it_for_nobody():
    """In the same turn of the event loop: its future is cancelled, and it still stands in line."""

    async def several():
        threads = Threads(1)
        await threads.wait('a', seconds=1)
        begun, ends = threading.Event(), threading.Event()
        working = asyncio.create_task(threads.run(lambda: begun.set() or ends.wait(10)))
        leaves = asyncio.create_task(threads.wait('b', seconds=10))
        stays = asyncio.create_task(threads.wait('c', seconds=10))
        await asyncio.sleep(0.05)
        assert begun.is_set()
        ends.set()
        time.sleep(0.05)  # the thread has told the loop that it is done
        leaves.cancel()
        assert await asyncio.wait_for(working, 1)
        await asyncio.wait_for(stays, 1)
        with pytest.raises(asyncio.CancelledError):
            await leaves
        await threads.run(lambda: None)
        await threads.wait('d', seconds=1)  # the place is there again

    asyncio.run(several())


def test_work_that_does_not_end_keeps_its_place():
    held = threading.Event()

    async def several():
        threads = Threads(1)
        await threads.wait('a', seconds=1)
        with pytest.raises(TimeoutError):
            await threads.run(lambda: held.wait(10), seconds=0.01)
        with pytest.raises(TimeoutError):
            await threads.end(seconds=0.05)
        held.set()
        await threads.end(seconds=5)

    asyncio.run(several())


def test_check_of_a_long_body_holds_up_nothing_else(app, monkeypatch):
    made, held, reading = app(keys=('a', 'b')), threading.Event(), threading.Semaphore(0)
    plain = schema.completion

    def slow(served, limits, fields, owner):
        if len(fields['prompt']) > 8192:
            reading.release()
            assert held.wait(10)
        return plain(served, limits, fields, owner)

    monkeypatch.setattr(schema, 'completion', slow)

    def ask(n, key='a', **settings):
        body = {'prompt': 'a' * n, 'max_tokens': 1}
        headers = {'authorization': f'Bearer {key}'}
        return call(made, 'POST', '/v1/completions', body, headers=headers, **settings)

    async def asked():
        long = [asyncio.create_task(ask(9000)) for _ in range(4)]
        await asyncio.to_thread(reading.acquire)
        await asyncio.to_thread(reading.acquire)
        short = await ask(9, 'b')
        gone = await ask(9000, 'b', leave_after=0)
        held.set()
        return short, gone, await asyncio.gather(*long)

    short, gone, long = asyncio.run(asked())
    assert short.status == 200 and gone.status == 499
    assert {answer.error['code'] for answer in long} == {'context_length_exceeded'}


def test_all_bodies_together_are_bounded(app, monkeypatch):
    monkeypatch.setattr(bodies, '_AT_A_TIME', 2)
    made = app(limits=fake.Limits(body_bytes=1000, body_seconds=0.2))

    def ask(n):
        data = b'{"prompt": "' + b'a' * n
        return call(made, 'POST', '/v1/completions', data, whole=False)

    async def several():
        return await asyncio.gather(*(ask(900) for _ in range(3)))

    assert [answer.status for answer in asyncio.run(several())] == [408, 408, 429]
    assert [answer.status for answer in asyncio.run(several())] == [408, 408, 429]
    assert post(made, '/v1/completions', {'prompt': 'a'}).status == 200


BODIES = (
    '{"prompt": [' + '[1,2],' * 90_000 + '[]]}',
    '{' + ','.join(f'"{i}":1' for i in range(80_000)) + '}',
)


@pytest.mark.parametrize('text', BODIES)
def test_json_of_many_values_lets_other_threads_go_on(text):
    assert ticks_while(lambda: body.parse(text.encode())) > 3


def test_json_of_many_values_is_read_as_that_of_few(monkeypatch):
    monkeypatch.setattr(body, '_MANY', -1)
    for text in (
        '{"a": [1, -2.5e3, true, false, null, "\\u00e9\\ud83d\\ude42", {"b": {}, "c": []}]}',
        ' {"字": "\\n", "a": 123456789012345678901234567890}\n',
    ):
        assert body.parse(text.encode()) == json.loads(text)
    for text in ('{"a": NaN}', '{"a": 1,}', '[1]', '{"a": 1} x', '{"a":' + '[' * 90_000, ''):
        with pytest.raises(ApiError) as error:
            body.parse(text.encode())
        assert error.value.code == 'invalid_json', text
    monkeypatch.setattr(body, '_CONTAINERS', 3)
    assert body.parse(b'{"a": [[], "[[{{"]}')
    with pytest.raises(ApiError, match='it holds more than 3 arrays and objects'):
        body.parse(b'{"a": [[], {}]}')


def test_texts_that_cannot_fit_are_not_read(app):
    made = app(length=64)
    for path, field, value in (
        ('/v1/completions', 'prompt', 'a' * 65),
        ('/v1/completions', 'prompt', ['a', 'a' * 65]),
        ('/v1/embeddings', 'input', 'a' * 65),
        ('/v1/chat/completions', 'messages', [{'role': 'user', 'content': 'a' * 65}]),
        ('/v1/chat/completions', 'messages', [{'role': 'user', 'content': 'a' * 30}] * 3),
    ):
        error = post(made, path, {field: value}).error
        assert error['code'] == 'context_length_exceeded' and error['param'] == field
        assert 'more than 64 tokens' in error['message']
    messages = [{'role': 'user', 'content': ''}] * 65
    error = post(made, '/v1/chat/completions', {'messages': messages}).error
    assert error['message'] == 'messages holds 65 messages: at most 64'


def test_large_answers_are_written_beside_the_event_loop(app, monkeypatch):
    made, threads = app(length=300), []
    for kind in (responses.Reply, responses.CompletionReply):
        for name in ('whole', 'chunks'):
            monkeypatch.setattr(kind, name, noting(getattr(kind, name), name, threads))
    body = {'prompt': 'a' * 200, 'echo': True, 'max_tokens': 1}
    small = post(made, '/v1/completions', body)
    assert {here for _, here in threads} == {True}
    threads.clear()
    large = post(made, '/v1/completions', {**body, 'logprobs': 20})
    assert ('whole', False) in threads and ('chunks', False) in threads
    threads.clear()
    assert len(large.json()['choices'][0]['logprobs']['tokens']) == 202
    assert post(made, '/v1/completions', {**body, 'logprobs': 20, 'stream': True}).events
    assert ('chunks', False) in threads
    assert [one['text'] for one in (small.json()['choices'][0], large.json()['choices'][0])] == [
        'a' * 201
    ] * 2


def noting(plain, name, threads):
    def noted(*args):
        threads.append((name, threading.current_thread() is threading.main_thread()))
        return plain(*args)

    return noted


def test_json_in_parts_is_that_of_the_library():
    value = {
        'a': [{'b': 1.5, 'c': [1, None, 'é\ud800']}, {}, {'d': [[], {}, [{'e': True}]]}],
        'f': [],
        'g': {'h': {}},
        '"': 'x',
    }
    assert errors.to_json_in_parts(value) == errors.to_json(value)
    assert json.loads(errors.to_json_in_parts(value)) == json.loads(json.dumps(value))
    large = {'data': [{'embedding': [0.1] * 4096} for _ in range(100)]}
    assert ticks_while(lambda: errors.to_json_in_parts(large)) > 3


def test_the_end_in_the_midst_of_a_submission_cancels_all_of_it(app):
    made = app(rows=8, pause=0.002)
    service = made.state.service
    engine, plain = service.served.engine, service.served.engine.submit

    def submit(request, on_event):
        if len(engine.requests) == 3:
            asyncio.get_running_loop().call_soon(service.close_streams)
        return plain(request, on_event)

    engine.submit = submit
    answer = post(made, '/v1/completions', {'prompt': 'a', 'n': 8, 'max_tokens': 500})
    assert answer.status == 503 and engine.stats().requests_total == {'cancelled': 8}

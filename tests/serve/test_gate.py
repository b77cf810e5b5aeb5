"""What is turned away, and how: keys, paths, methods, bodies, a full queue."""

import asyncio
import dataclasses
import json
import threading

import pytest

from tests.serve import fake
from tests.serve.asgi import call, get, post

PATHS = ('/v1/completions', '/v1/chat/completions', '/v1/embeddings')


def test_key(app):
    made = app(keys=('one', 'schlüssel'))
    for headers in ({}, {'authorization': 'Bearer two'}, {'authorization': 'one'}):
        for answer in (
            post(made, PATHS[0], {'prompt': 'a'}, headers=headers),
            get(made, '/v1/models', headers=headers),
        ):
            assert answer.status == 401 and answer.error['type'] == 'authentication_error'
            assert answer.headers['www-authenticate'] == 'Bearer'
    for path in ('/health', '/metrics', '/'):
        assert get(made, path).status == 200
    assert get(made, '/v1/models', headers={'authorization': 'bearer one'}).status == 200
    as_sent = 'schlüssel'.encode().decode('latin-1')
    assert get(made, '/v1/models', headers={'authorization': f'Bearer {as_sent}'}).status == 200


def test_owner_is_the_key_or_the_address(app):
    for keys, owner in (((), '192.0.2.1'), (('a', 'b'), 'key 1')):
        made = app(keys=keys)
        post(made, PATHS[0], {'prompt': 'a'}, headers={'authorization': 'Bearer b'})
        (request,) = made.state.service.served.engine.requests
        assert request.owner == owner


def test_paths_and_methods(app):
    made = app()
    answer = get(made, '/v1/nothing\n')
    assert answer.status == 404 and '/v1/nothing' in answer.error['message']
    for path in PATHS:
        answer = get(made, path)
        assert answer.status == 405 and answer.headers['allow'] == 'POST' and answer.error
    answer = post(made, '/health', {})
    assert answer.status == 405 and answer.error
    assert post(made, PATHS[0] + '/', {}).status == 404


@pytest.mark.parametrize('path', PATHS)
def test_bodies_that_are_no_json_objects(app, path):
    made = app()
    for body in (
        *(b'', b'{', b'[]', b'null', b'"a"', b'\xff\xfe', b'\x80', b'{"a": NaN}'),
        *(b'[' * 15_000, b'{"a": ' + b'1' * 5000 + b'}', b'{"prompt": 1} x'),
    ):
        answer = post(made, path, body)
        assert answer.status == 400, body[:20]
        assert answer.error['type'] == 'invalid_request_error'


def test_content_types(app):
    made = app()
    for headers in (
        {'content-type': 'text/plain'},
        {'content-type': 'application/x-www-form-urlencoded'},
        {'content-encoding': 'gzip'},
    ):
        answer = post(made, PATHS[0], {'prompt': 'a'}, headers=headers)
        assert answer.status == 415 and answer.error
    kind = 'Application/JSON; charset=utf-8'
    assert post(made, PATHS[0], {'prompt': 'a'}, headers={'content-type': kind}).status == 200


def test_body_that_is_too_long(app):
    made = app()
    fits = json.dumps({'prompt': 'a', 'x': ''}).encode()
    answer = post(made, PATHS[0], fits + b' ' * (20_000 - len(fits)))
    assert answer.status == 400 and answer.error['param'] == 'x'
    for spaces in (20_001, 400_000):
        answer = post(made, PATHS[0], fits + b' ' * spaces)
        assert answer.status == 413 and '20000 bytes' in answer.error['message']


def test_body_that_does_not_end(app):
    answer = post(app(), PATHS[0], b'{"prompt"', whole=False)
    assert answer.status == 408 and answer.error


def test_client_that_leaves_before_its_body_is_there(app):
    made = app()
    answer = post(made, PATHS[0], b'{"prompt"', whole=False, leave_after=0)
    assert answer.status == 499
    assert b'status="499"} 1' in get(made, '/metrics').body


def test_full_queue(app):
    made = app(rows=1, queue=2, pause=0.02)
    engine = made.state.service.served.engine
    body = {'prompt': 'a', 'max_tokens': 5}

    async def several():
        return await asyncio.gather(*(call(made, 'POST', PATHS[0], body) for _ in range(12)))

    answers = asyncio.run(several())
    assert {answer.status for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status == 429)
    assert refused.error['type'] == 'rate_limit_error' and refused.error['code'] == 'queue_full'
    assert int(refused.headers['retry-after']) >= 1
    assert engine.idle()
    # All choices or none: those that had room are taken back.
    answer = post(made, PATHS[0], {**body, 'n': 5, 'stream': True})
    assert answer.status == 429
    assert engine.idle()
    assert post(made, PATHS[0], body).status == 200


def test_a_grammar_that_compiles_for_ever_holds_up_nothing_else(app):
    held = threading.Event()

    def make_grammar(wanted):
        if wanted.get('regex') == 'slow':
            held.wait(60)
        return None

    limits = dataclasses.replace(fake.SMALL, grammar_seconds=0.3)
    made = app(limits=limits, parts={'make_grammar': make_grammar})
    slow, quick = {'prompt': 'a', 'regex': 'slow'}, {'prompt': 'a', 'regex': 'quick'}

    async def asked():
        stuck = await asyncio.gather(*[call(made, 'POST', PATHS[0], slow) for _ in range(2)])
        full = await call(made, 'POST', PATHS[0], quick)
        free = [await call(made, 'POST', PATHS[0], {'prompt': text}) for text in ('a', 'a' * 9000)]
        held.set()
        await asyncio.sleep(0.1)
        return stuck, full, free, await call(made, 'POST', PATHS[0], quick)

    stuck, full, free, after = asyncio.run(asked())
    for answer in stuck:
        assert answer.status == 400 and 'takes more than 0.3 s' in answer.error['message']
    assert full.status == 429 and 'being compiled' in full.error['message']
    assert free[0].status == 200
    assert free[1].error['code'] == 'context_length_exceeded'
    assert after.status == 200


def test_refusal_of_the_engine(app, monkeypatch):
    made = app()

    def refuse(request, on_event):
        raise fake.UserError('typical_p does not go with this model: leave it out')

    monkeypatch.setattr(made.state.service.served.engine, 'submit', refuse)
    answer = post(made, PATHS[0], {'prompt': 'a'})
    assert answer.status == 400 and 'typical_p' in answer.error['message']


def test_failure_of_the_server_is_json(app, monkeypatch):
    made = app()

    def fail(request, on_event):
        raise RuntimeError('secret')

    monkeypatch.setattr(made.state.service.served.engine, 'submit', fail)
    seen = []

    async def calls():
        try:
            await call(made, 'POST', PATHS[0], {'prompt': 'a'})
        except RuntimeError as error:  # for the log; the answer was given before
            seen.append(error)

    asyncio.run(calls())
    assert len(seen) == 1 and not made.state.service._feeds
    assert b'status="500"} 1' in get(made, '/metrics').body


def test_closing(app):
    made = app()
    assert get(made, '/health').json() == {'status': 'ok'}
    made.state.service.close_streams()
    assert get(made, '/health').status == 503
    answer = post(made, PATHS[0], {'prompt': 'a'})
    assert answer.status == 503 and answer.error['code'] == 'shutting_down'


def test_a_stopped_engine(app):
    made = app()
    made.state.service.served.engine.close()
    health = get(made, '/health')
    assert (health.status, health.json()) == (503, {'status': 'stopped'})
    answer = post(made, PATHS[0], {'prompt': 'a'})
    assert answer.status == 503 and answer.error['code'] == 'engine_stopped'
    assert get(made, '/metrics').status == 200


def test_page(app):
    made = app()
    for path, kind in (('/', 'text/html'), ('/page.css', 'text/css'), ('/page.js', 'javascript')):
        answer = get(made, path)
        assert answer.status == 200 and kind in answer.headers['content-type']
        assert "default-src 'none'" in answer.headers['content-security-policy']
        # The page names no other server, and text of a model never becomes HTML.
        for never in (b'http:', b'https:', b"'//", b'"//', b'innerHTML', b'style='):
            assert never not in answer.body

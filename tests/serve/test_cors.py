"""Pages of other origins: those that were named may ask, as browsers do it; others may not."""

import asyncio

import pytest

from llama_jax.errors import UserError
from llama_jax.serve import cors
from llama_jax.serve.app import build
from tests.serve import fake
from tests.serve.asgi import call, get, post

HERE, THERE = 'https://a.example', 'https://b.example:8080'
PATH, BODY = '/v1/completions', {'prompt': 'a', 'max_tokens': 2}


@pytest.fixture
def made(engine):
    def make(*origins, **settings):
        return build(fake.served(engine()), limits=fake.SMALL, origins=origins, **settings)

    return make


def preflight(app, origin, **more):
    asks = {
        'origin': origin,
        'access-control-request-method': 'POST',
        'access-control-request-headers': 'authorization,content-type,x-stainless-os',
        **more,
    }
    return asyncio.run(call(app, 'OPTIONS', PATH, headers=asks))


def test_no_page_of_others_may_ask(made):
    app = made()
    answer = post(app, PATH, BODY, headers={'origin': HERE})
    assert not any(name.startswith('access-control') for name in answer.headers)
    answer = preflight(app, HERE)
    assert answer.status == 405
    assert not any(name.startswith('access-control') for name in answer.headers)


@pytest.mark.parametrize('origins', [(HERE, THERE), ('*',)])
def test_pages_that_may_ask(made, origins):
    app = made(*origins, keys=('k',))
    allowed = '*' if origins == ('*',) else THERE
    private = {'access-control-request-private-network': 'true'}
    answer = preflight(app, THERE, **private)  # without the key, as browsers do
    assert answer.status == 200
    assert answer.headers['access-control-allow-origin'] == allowed
    assert 'POST' in answer.headers['access-control-allow-methods']
    assert 'x-stainless-os' in answer.headers['access-control-allow-headers']
    assert answer.headers['access-control-allow-private-network'] == 'true'
    headers = {'origin': THERE, 'authorization': 'Bearer k'}
    for answer in (
        post(app, PATH, BODY, headers=headers),
        post(app, PATH, {**BODY, 'stream': True}, headers=headers),
        post(app, PATH, {**BODY, 'top_k': 'x'}, headers=headers),
        post(app, PATH, BODY, headers={'origin': THERE}),
        get(app, '/v1/models', headers=headers),
    ):
        assert answer.headers['access-control-allow-origin'] == allowed, answer
        assert 'retry-after' in answer.headers['access-control-expose-headers'].lower()
        assert 'access-control-allow-credentials' not in answer.headers
    assert app.state.service.served.engine.requests[0].owner == 'key 0'


def test_other_pages_beside_them(made):
    app = made(HERE)
    for other in (THERE, 'https://a.example.evil', 'http://a.example', 'null'):
        assert 'access-control-allow-origin' not in preflight(app, other).headers
        answer = post(app, PATH, BODY, headers={'origin': other})
        assert 'access-control-allow-origin' not in answer.headers


@pytest.mark.parametrize(
    'origin',
    [
        'example.org',
        'https://a.example/',
        'https://A.example',
        'https://a b',
        '',
        'https://',
        'null',
    ],
)
def test_what_is_no_origin(origin):
    with pytest.raises(UserError, match='is no origin: give SCHEME://HOST') as error:
        cors.check(['*', origin])
    assert '\n' not in str(error.value)
    cors.check(['*', HERE, THERE, 'http://localhost:3000', 'http://[::1]:80', 'app://obsidian.md'])

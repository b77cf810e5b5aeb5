"""Five thousand bodies that nobody would send: each is answered in JSON, never by a failure."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.serve import schema
from llama_jax.serve.app import build
from llama_jax.text.infill import Infill
from tests.serve import fake
from tests.serve.asgi import call

EXAMPLES, BODIES = 500, 10

numbers = st.one_of(
    st.integers(-3, 40),
    st.floats(0, 2),
    st.floats(),
    st.sampled_from([0, 1, -1, 2**31, 2**32 - 1, 2**64, 10**400, 1e308, -0.0, True]),
)
texts = st.one_of(
    st.sampled_from(['', 'a', '你好', '🙂', '\0', '\ud800', 'user', 'text', 'a' * 70, fake.MODEL]),
    st.text(st.characters(codec=None), max_size=12),
)
anything = st.recursive(
    st.none() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
turns = st.fixed_dictionaries(
    {'role': st.sampled_from(['user', 'system', 'assistant']), 'content': st.text(max_size=3)}
)
messages = st.lists(turns, min_size=1, max_size=2) | st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            'role': st.sampled_from(['user', 'system', 'assistant', 'tool']) | anything,
            'content': texts | anything,
            'name': anything,
        },
    ),
    max_size=3,
)
RIGHT = {
    'prompt': texts | st.lists(texts, max_size=3) | st.lists(st.integers(-1, 300), max_size=5),
    'input': texts | st.lists(texts, max_size=3) | st.lists(st.integers(-1, 300), max_size=5),
    'messages': messages,
    'max_tokens': st.integers(0, 20),
    'max_completion_tokens': st.integers(1, 20),
    'n': st.integers(0, 4),
    'stream': st.booleans(),
    'echo': st.booleans(),
    'stream_options': st.just({'include_usage': True}),
    'stop': texts | st.lists(texts, max_size=3),
    'logit_bias': st.dictionaries(st.integers(-1, 300).map(str), numbers, max_size=3),
    'logprobs': st.booleans() | st.integers(0, 21),
    'top_logprobs': st.integers(0, 21),
    'stop_token_ids': st.lists(st.integers(-1, 300), max_size=4),
    'response_format': st.sampled_from(
        [
            {'type': 'text'},
            {'type': 'json_object'},
            {'type': 'json_schema', 'json_schema': {'schema': {}}},
        ]
    ),
    'timeout': st.just(5) | numbers,
    'suffix': texts,
    'best_of': st.integers(0, 4),
    'regex': texts,
    'model': st.just(fake.MODEL) | texts,
}
NAMES = sorted(schema.COMPLETION_FIELDS | schema.CHAT_FIELDS | schema.EMBEDDING_FIELDS)
ROUTES = {
    '/v1/completions': ('prompt', schema.COMPLETION_FIELDS),
    '/v1/chat/completions': ('messages', schema.CHAT_FIELDS),
    '/v1/embeddings': ('input', schema.EMBEDDING_FIELDS),
}


@st.composite
def posts(draw):
    """A path and a body: near enough to a right one to get deep, or anything at all."""
    path = draw(st.sampled_from(sorted(ROUTES)))
    main, fields = ROUTES[path]
    how = draw(st.integers(0, 9))
    if how == 0:
        return path, draw(st.binary(max_size=30))
    if how == 1:
        return path, json.dumps(draw(anything)).encode()
    names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=4))
    if how == 2:
        names += draw(st.lists(st.sampled_from(NAMES) | texts, max_size=2))
    body = {}
    for name in {main, *names}:
        right = RIGHT.get(name, numbers)
        body[name] = draw(anything if draw(st.integers(0, 5)) == 0 else right)
    return path, json.dumps(body).encode()


class Anything:
    """A grammar that the fake engine never asks."""


@pytest.mark.slow
def test_five_thousand_bodies():
    engine = fake.FakeEngine(rows=16, queue=64, length=96)
    infill = Infill(prefix=1, suffix=2, middle=3, ends=(4,))
    parts = fake.served(engine, make_grammar=lambda wanted: Anything(), infill=infill)
    app = build(parts, limits=fake.SMALL)
    seen = {}

    async def answers(batch):
        return await asyncio.gather(*(call(app, 'POST', path, body) for path, body in batch))

    with asyncio.Runner() as runner:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(posts(), min_size=BODIES, max_size=BODIES))
        def fuzz(batch):
            for (path, body), answer in zip(batch, runner.run(answers(batch)), strict=True):
                late = path == '/v1/embeddings' and b'timeout' in body
                assert answer.status in (200, 400, 404, 429, *[504] * late), (path, body, answer)
                if answer.status != 200:
                    error = answer.error
                    assert error['message'] and '\n' not in error['message'], (path, body)
                    assert answer.headers['content-type'] == 'application/json'
                elif answer.headers['content-type'].startswith('text/event-stream'):
                    assert answer.events
                else:
                    assert answer.json()['object']
                seen[path, answer.status] = seen.get((path, answer.status), 0) + 1

        fuzz()
    assert engine.idle()
    engine.close()
    assert sum(seen.values()) >= EXAMPLES * BODIES
    for path in ROUTES:
        assert seen[path, 200] > 100 and seen[path, 400] > 100, seen

"""What clients send unasked, and every field of OpenAI: taken, used, or refused by its name."""

import pytest

pytest.importorskip('openai')

from openai.types import Completion, CreateEmbeddingResponse, Model  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402
from openai.types.chat import completion_create_params as chat_params  # noqa: E402
from openai.types.completion_create_params import (  # noqa: E402
    CompletionCreateParamsBase,
    CompletionCreateParamsStreaming,
)
from openai.types.embedding_create_params import EmbeddingCreateParams  # noqa: E402

from llama_jax.serve import schema  # noqa: E402
from llama_jax.serve.errors import ApiError  # noqa: E402
from llama_jax.serve.served import Limits  # noqa: E402
from llama_jax.text.infill import Infill  # noqa: E402
from tests.serve import fake  # noqa: E402
from tests.serve.asgi import get, post  # noqa: E402
from tests.serve.fake import BOS, EOS, says  # noqa: E402

BODIES = {
    'completion': {'prompt': 'ab', 'seed': 1},
    'chat': {'messages': [{'role': 'user', 'content': 'hi'}], 'seed': 1},
    'embedding': {'input': 'ab'},
}
OF_OPENAI = {
    'completion': {
        *CompletionCreateParamsBase.__annotations__,
        *CompletionCreateParamsStreaming.__annotations__,
    },
    'chat': {
        *chat_params.CompletionCreateParamsBase.__annotations__,
        *chat_params.CompletionCreateParamsStreaming.__annotations__,
    },
    'embedding': {*EmbeddingCreateParams.__annotations__},
}
USED = {
    'completion': schema.COMPLETION_FIELDS,
    'chat': schema.CHAT_FIELDS,
    'embedding': schema.EMBEDDING_FIELDS,
}
UNREAD = {
    **{'user': 'someone', 'metadata': {'a': 'b'}, 'store': True, 'service_tier': 'flex'},
    **{'safety_identifier': 'x', 'prompt_cache_key': 'x', 'prompt_cache_retention': '24h'},
    **{'prompt_cache_options': {'mode': 'implicit'}, 'verbosity': 'low'},
}
REFUSED = {
    'audio': {'voice': 'alloy', 'format': 'wav'},
    'moderation': {'model': 'omni'},
    'prediction': {'type': 'content', 'content': 'a'},
    'web_search_options': {},
    'modalities': ['text', 'audio'],
    'functions': [{'name': 'f'}],
    'function_call': 'auto',
    'dimensions': 8,
}


@pytest.fixture
def parts(engine):
    return fake.served(engine(length=64)), Limits()


def asked(parts, kind, **body):
    body = {**BODIES[kind], **body}
    if kind == 'embedding':
        return schema.embeddings(*parts, body)
    return getattr(schema, kind)(*parts, body, 'me')


def told(ask):
    """All that decides about the answer."""
    if isinstance(ask, schema.EmbeddingAsk):
        return ask.inputs, ask.base64
    made = [(request.prompt, request.controls) for request in ask.requests]
    return made, ask.n, ask.stream, ask.logprobs, ask.echo


@pytest.mark.parametrize(
    ('kind', 'name'), [(kind, name) for kind, names in OF_OPENAI.items() for name in sorted(names)]
)
def test_every_field_of_openai(parts, kind, name):
    assert (name in USED[kind]) + (name in UNREAD) + (name in REFUSED) == 1
    plain = told(asked(parts, kind))
    if name in UNREAD:
        assert told(asked(parts, kind, **{name: UNREAD[name]})) == plain
    if name in REFUSED:
        with pytest.raises(ApiError) as error:
            asked(parts, kind, **{name: REFUSED[name]})
        assert (error.value.status, error.value.param) == (400, name)
        assert error.value.code == 'unsupported_parameter'
    if name not in BODIES[kind]:
        assert told(asked(parts, kind, **{name: None})) == plain


NOTHING = [
    *({'stop': ''}, {'stop': []}, {'stop': ['']}, {'stop': [None]}, {'logit_bias': {}}),
    *({'stop_token_ids': []}, {'response_format': {}}, {'response_format': {'type': 'text'}}),
    *({'regex': ''}, {'stream_options': {}}, {'stream_options': {'include_usage': True}}),
    *({'model': ''}, {'top_k': -1}, {'top_k': 0}, {'logprobs': False}, {'n': 1}, {'best_of': 1}),
    *({'cache_prompt': True}, {'keep_alive': '5m'}, {'skip_special_tokens': True}),
    *({'repeat_penalty': 1.0}, {'length_penalty': 1}, {'use_beam_search': False}),
]


@pytest.mark.parametrize('body', NOTHING, ids=str)
@pytest.mark.parametrize('kind', ['completion', 'chat'])
def test_forms_of_nothing(parts, kind, body):
    assert told(asked(parts, kind, **body)) == told(asked(parts, kind))


def test_forms_of_nothing_in_one_of_them(parts):
    for body in (
        *({'tools': []}, {'functions': []}, {'function_call': 'none'}, {'tool_choice': 'none'}),
        *({'tool_choice': 'auto'}, {'documents': []}, {'chat_template_kwargs': {}}),
        *({'top_logprobs': 0}, {'modalities': ['text']}, {'reasoning_effort': ''}),
    ):
        assert told(asked(parts, 'chat', **body)) == told(asked(parts, 'chat')), body
    assert told(asked(parts, 'completion', suffix='')) == told(asked(parts, 'completion'))
    begin = asked(parts, 'completion', prompt=None)
    assert begin.prompts[0].ids == (BOS,), 'null is the beginning of a document'
    with pytest.raises(ApiError, match='prompt is missing'):
        schema.completion(*parts, {}, 'me')


def controls(parts, **body):
    return asked(parts, 'completion', **body).requests[0].controls


def test_numbers_at_their_ends(parts):
    greedy = controls(parts, top_p=0, temperature=0.7)
    assert (greedy.temperature, greedy.top_p) == (0, 1)
    assert len({controls(parts, seed=-1).seed for _ in range(8)}) > 1, 'another one each time'
    large = [controls(parts, seed=seed).seed for seed in (2**63 - 1, 2**64 - 1, 2**32, -2, 0)]
    assert len({*large}) == 5 and all(0 <= seed < 2**32 for seed in large)
    assert controls(parts, seed=2**40).seed == controls(parts, seed=2**40).seed
    assert controls(parts, seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize(
    ('body', 'message'),
    [
        ({'temprature': 1}, 'temprature is not supported: leave it out, or give temperature'),
        ({'repeat_penalty': 1.1}, 'repeat_penalty 1.1 is not supported, only 1: give repetition_p'),
        ({'guided_json': {}}, 'guided_json is not supported: give response_format or regex'),
        ({'web_search_options': {}}, 'web_search_options is not supported: leave it out'),
        ({'x' * 9000: 1}, 'x…? is not supported: leave it out'),
    ],
)
def test_what_to_do_about_a_field(parts, body, message):
    with pytest.raises(ApiError, match=message):
        asked(parts, 'chat', **body)


def test_best_of(app, monkeypatch):
    """The best by the mean log-probability of a token, which is told although nobody asks."""
    texts = iter(['aab', 'a', 'bbbbb', 'ab', 'b', 'aaa'])
    made = app(script=lambda request: [*next(texts).encode(), EOS])
    chances = {ord('a'): -1.0, ord('b'): -2.0, EOS: -0.1}
    monkeypatch.setattr(fake, 'logprob', lambda token, top: fake.Logprob(token, chances[token]))
    body = {'prompt': ['p', 'q'], 'n': 2, 'best_of': 3, 'max_tokens': 9}
    answer = post(made, '/v1/completions', body).json()
    texts_told = [choice['text'] for choice in answer['choices']]
    assert texts_told == ['a', 'aab', 'aaa', 'ab']
    assert [choice['index'] for choice in answer['choices']] == [0, 1, 2, 3]
    assert all(choice['logprobs'] is None for choice in answer['choices'])
    assert answer['usage']['prompt_tokens'] == 4 and answer['usage']['completion_tokens'] == 15
    requests = made.state.service.served.engine.requests
    assert {request.controls.logprobs for request in requests} == {0}


INFILL = Infill(prefix=1, suffix=2, middle=3, ends=(4, 5))


def test_suffix(app):
    made = app(script=says('m'), parts={'infill': INFILL})
    assert get(made, '/v1/models').json()['data'][0]['infill'] is True
    body = {'prompt': ['ab', [7]], 'suffix': 'yz', 'stop_token_ids': [5, 6]}
    answer = post(made, '/v1/completions', body).json()
    assert [choice['text'] for choice in answer['choices']] == ['m', 'm']
    requests = made.state.service.served.engine.requests
    behind = (2, ord('y'), ord('z'), 3)
    assert {request.prompt for request in requests} == {
        (BOS, 1, ord('a'), ord('b'), *behind),
        (BOS, 1, 7, *behind),
    }
    assert {request.controls.stop_ids for request in requests} == {(5, 6, 4)}
    assert answer['usage']['prompt_tokens'] == 8 + 7


@pytest.mark.parametrize(
    ('infill', 'body', 'param'),
    [
        (None, {'suffix': 'a'}, 'suffix'),
        (INFILL, {'suffix': 3}, 'suffix'),
        (INFILL, {'suffix': 'a', 'echo': True}, 'echo'),
        (INFILL, {'suffix': 'a', 'stop_token_ids': [*range(6, 21)]}, 'stop_token_ids'),
        (INFILL, {'suffix': 'a' * 60}, 'prompt'),
        (INFILL, {'suffix': '\ud800'}, 'suffix'),
        (INFILL, {'suffix': '\ud800', 'prompt': [1, 2]}, 'suffix'),
    ],
)
def test_suffix_that_is_refused(engine, infill, body, param):
    parts = fake.served(engine(length=64), infill=infill), Limits()
    with pytest.raises(ApiError) as error:
        asked(parts, 'completion', **body)
    assert (error.value.status, error.value.param) == (400, param)


def test_answers_are_of_the_types_of_openai(app):
    """As their client declares them, where it reads them loosely."""
    made = app(script=says('yes'))
    listed = get(made, '/v1/models').json()
    assert listed['object'] == 'list'
    Model.model_validate(listed['data'][0], strict=True)
    CreateEmbeddingResponse.model_validate(post(made, '/v1/embeddings', {'input': 'a'}).json())
    more = {'n': 2, 'max_tokens': 4, 'stream_options': {'include_usage': True}}
    for path, body, whole, chunk in (
        ('completions', {'prompt': 'a', 'logprobs': 2}, Completion, Completion),
        (
            'chat/completions',
            {**BODIES['chat'], 'logprobs': True, 'top_logprobs': 2},
            ChatCompletion,
            ChatCompletionChunk,
        ),
    ):
        whole.model_validate(post(made, f'/v1/{path}', {**body, **more}).json(), strict=True)
        for event in post(made, f'/v1/{path}', {**body, **more, 'stream': True}).events:
            if chunk is Completion:  # which has no type for what comes before the end
                for choice in event['choices']:
                    choice['finish_reason'] = choice['finish_reason'] or 'stop'
            chunk.model_validate(event, strict=True)


def test_errors_are_of_the_shape_of_openai(app):
    for path, body in (
        ('/v1/completions', {'prompt': 'a', 'n': 99}),
        ('/v1/completions', b'{'),
        ('/v1/chat/completions', {}),
        ('/v1/nothing', {}),
        ('/v1/completions', {'prompt': 'a', 'model': 'gpt-4'}),
    ):
        error = post(app(), path, body).error
        assert [*error] == ['message', 'type', 'param', 'code']
        assert isinstance(error['message'], str) and isinstance(error['type'], str)
        assert all(error[name] is None or isinstance(error[name], str) for name in error)

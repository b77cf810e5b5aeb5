"""Every field of a body reaches the engine, or is refused by its name."""

import time

import pytest

from llama_jax.errors import UserError
from llama_jax.serve import schema
from llama_jax.serve.errors import ApiError
from llama_jax.serve.served import Limits
from tests.serve import fake
from tests.serve.fake import BOS


@pytest.fixture
def parts(engine):
    return fake.served(engine(length=64)), Limits()


def completion(parts, **body):
    return schema.completion(*parts, {'prompt': 'ab', **body}, 'me')


def chat(parts, **body):
    return schema.chat(*parts, {'messages': [{'role': 'user', 'content': 'hi'}], **body}, 'me')


def controls(ask):
    return ask.requests[0].controls


@pytest.mark.parametrize(
    ('field', 'value', 'control'),
    [
        ('temperature', 0, 'temperature'),
        ('top_p', 0.5, 'top_p'),
        ('top_k', 7, 'top_k'),
        ('min_p', 0.1, 'min_p'),
        ('typical_p', 0.9, 'typical_p'),
        ('repetition_penalty', 1.2, 'repetition_penalty'),
        ('presence_penalty', -2, 'presence_penalty'),
        ('frequency_penalty', 1.5, 'frequency_penalty'),
        ('max_tokens', 5, 'max_tokens'),
        ('min_tokens', 3, 'min_tokens'),
        ('seed', 4294967295, 'seed'),
        ('ignore_eos', True, 'ignore_end'),
        ('prompt_logprobs', 2, 'prompt_logprobs'),
    ],
)
@pytest.mark.parametrize('ask', [completion, chat])
def test_fields_become_controls(parts, ask, field, value, control):
    assert getattr(controls(ask(parts, **{field: value})), control) == value


@pytest.mark.parametrize('ask', [completion, chat])
def test_fields_of_several_values(parts, ask):
    got = controls(ask(parts, stop='x', stop_token_ids=[5], logit_bias={'65': -100, '066': 1}))
    assert got.stop == ('x',) and got.stop_ids == (5,)
    assert got.logit_bias == {65: -100.0, 66: 1.0}
    assert controls(ask(parts, stop=['x', '\n\n'])).stop == ('x', '\n\n')


@pytest.mark.parametrize('ask', [completion, chat])
def test_null_is_absent(parts, ask):
    names = schema.COMPLETION_FIELDS & schema.CHAT_FIELDS
    got, plain = ask(parts, **dict.fromkeys(names)), ask(parts)
    assert controls(got).max_tokens == controls(plain).max_tokens
    assert controls(got).temperature == 1.0


def test_what_is_taken_where_nothing_is_said(parts):
    assert controls(completion(parts)).max_tokens == 16
    ask = chat(parts)
    assert len(ask.prompts[0].ids) + controls(ask).max_tokens == 64
    seeds = {controls(completion(parts)).seed for _ in range(8)}
    assert len(seeds) > 1, 'requests without a seed draw different texts'
    left = completion(parts).requests[0].deadline - time.monotonic()
    assert Limits().seconds - 5 < left <= Limits().seconds


def test_prompts(parts):
    for prompt, ids in (
        ('ab', [(BOS, 97, 98)]),
        ('', [(BOS,)]),
        (['ab', 'c'], [(BOS, 97, 98), (BOS, 99)]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        (['a', [3]], [(BOS, 97), (3,)]),
    ):
        ask = completion(parts, prompt=prompt)
        assert [p.ids for p in ask.prompts] == ids
        assert [tuple(r.prompt) for r in ask.requests] == ids


def test_n_samples_have_seeds_in_a_row_and_share_owner_and_deadline(parts):
    ask = completion(parts, prompt=['a', 'b'], n=3, seed=2**32 - 2)
    assert [r.controls.seed for r in ask.requests] == [2**32 - 2, 2**32 - 1, 0] * 2
    assert [ask.prompt(i).text for i in range(6)] == ['a'] * 3 + ['b'] * 3
    assert {r.owner for r in ask.requests} == {'me'}
    assert len({r.deadline for r in ask.requests}) == 1


def test_timeout_is_a_deadline(parts):
    begin = time.monotonic()
    deadline = completion(parts, timeout=1.5).requests[0].deadline
    assert 1.5 <= deadline - begin < 2.5


def test_completion_tokens_of_a_chat_have_two_names(parts):
    assert controls(chat(parts, max_completion_tokens=7)).max_tokens == 7
    assert controls(chat(parts, max_completion_tokens=7, max_tokens=7)).max_tokens == 7
    with pytest.raises(ApiError) as error:
        chat(parts, max_completion_tokens=7, max_tokens=8)
    assert error.value.param == 'max_tokens'


def test_logprobs(parts):
    assert controls(completion(parts)).logprobs is None
    assert controls(completion(parts, logprobs=0)).logprobs == 0
    assert controls(chat(parts, logprobs=False)).logprobs is None
    assert controls(chat(parts, logprobs=True)).logprobs == 0
    assert controls(chat(parts, logprobs=True, top_logprobs=3)).logprobs == 3
    assert controls(completion(parts, logprobs=2)).prompt_logprobs is None
    assert controls(completion(parts, logprobs=2, echo=True)).prompt_logprobs == 2


@pytest.mark.parametrize(
    ('asked', 'scored'),
    [
        ({'echo': True, 'logprobs': 1}, 1),
        ({'echo': True}, 0),  # the engine scores what it reads, and draws nothing
        ({'echo': True, 'prompt_logprobs': 2}, 2),
        ({'prompt_logprobs': 3}, 3),
    ],
)
def test_scoring_alone_draws_nothing(parts, asked, scored):
    one = controls(completion(parts, max_tokens=0, **asked))
    assert (one.max_tokens, one.prompt_logprobs) == (0, scored)


def test_a_prompt_several_times_goes_on_with_the_seeds(parts):
    def seeds(**fields):
        return [r.controls.seed for r in completion(parts, **fields).requests]

    assert seeds(prompt=['a', 'b', 'a'], n=2, seed=5) == [5, 6, 5, 6, 7, 8]
    assert len(set(seeds(prompt=['a', 'b', 'a'], n=2))) == 6, 'none given: all are others'
    assert set(seeds(prompt=['a'] * 3)) & set(seeds(prompt=['a'] * 3)) == set()


def test_grammar_is_made_anew_for_each_choice(engine):
    asked = []

    def make(wanted):
        asked.append(wanted)
        return object()

    parts = fake.served(engine(length=64), make_grammar=make), Limits()
    schema_format = {'type': 'json_schema', 'json_schema': {'name': 'n', 'schema': {'a': None}}}
    for body, wanted in (
        ({'response_format': {'type': 'json_object'}}, {'type': 'json_object'}),
        ({'response_format': schema_format}, {'type': 'json_schema', 'schema': {'a': None}}),
        (
            {'response_format': {'type': 'json_object', 'schema': {'type': 'null'}}},
            {'type': 'json_schema', 'schema': {'type': 'null'}},
        ),
        ({'regex': 'a+'}, {'type': 'regex', 'regex': 'a+'}),
    ):
        asked.clear()
        ask = completion(parts, n=2, **body)
        assert asked == [wanted, wanted]
        assert ask.requests[0].grammar is not ask.requests[1].grammar
    for name, value in (('min_tokens', 2), ('ignore_eos', True)):
        with pytest.raises(ApiError) as error:
            completion(parts, regex='a+', **{name: value})
        assert error.value.param == name, 'the grammar says where the text ends'
    asked.clear()
    assert chat(parts, response_format={'type': 'text'}).requests[0].grammar is None
    assert not asked


def test_grammar_that_cannot_be_made(engine):
    def make(wanted):
        raise UserError('the pattern is open')

    parts = fake.served(engine(length=64), make_grammar=make), Limits()
    for name, value in (('regex', '('), ('response_format', {'type': 'json_object'})):
        with pytest.raises(ApiError) as error:
            completion(parts, **{name: value})
        assert (error.value.status, error.value.param) == (400, name)
        assert 'open' in error.value.message


REFUSED = [
    ('temperature', 'warm'),
    ('temperature', True),
    ('temperature', -1),
    ('temperature', 10**400),
    ('top_p', -0.1),
    ('top_p', 1.1),
    ('top_k', -2),
    ('top_k', 2.0),
    ('top_k', 2**40),
    ('min_p', 2),
    ('typical_p', 0),
    ('repetition_penalty', 0),
    ('presence_penalty', 101),
    ('frequency_penalty', []),
    ('max_tokens', -1),
    ('max_tokens', 10**400),
    ('max_tokens', '5'),
    ('min_tokens', -1),
    ('min_tokens', 60),
    ('seed', 2**64),
    ('seed', -(2**64)),
    ('seed', 1.5),
    ('n', 0),
    ('n', 10**9),
    ('stop', ['a', 1]),
    ('stop', ['a'] * 17),
    ('stop', 'a' * 257),
    ('stop_token_ids', [259]),
    ('stop_token_ids', [True]),
    ('stop_token_ids', list(range(17))),
    ('logit_bias', {'259': 1}),
    ('logit_bias', {'-1': 1}),
    ('logit_bias', {'٣': 1}),
    ('logit_bias', {'1': 101}),
    ('logit_bias', {'1': None}),
    ('logit_bias', []),
    ('ignore_eos', 1),
    ('prompt_logprobs', 21),
    ('timeout', 0),
    ('timeout', 1e9),
    ('stream', 'yes'),
    ('stream_options', 'usage'),
    ('response_format', {'type': 'json_object'}),
    ('response_format', 'json'),
    ('regex', 'a+'),
    ('model', 7),
    ('best_of', 0),
    ('tools', [{'type': 'function'}]),
    ('no_such_field', 0),
]


@pytest.mark.parametrize(('field', 'value'), REFUSED, ids=lambda x: str(x)[:20])
@pytest.mark.parametrize('ask', [completion, chat])
def test_refused_by_name(parts, ask, field, value):
    with pytest.raises(ApiError) as error:
        ask(parts, **{field: value})
    assert error.value.status == 400 and error.value.param.split('[')[0] == field
    assert field in error.value.message and '\n' not in error.value.message


@pytest.mark.parametrize(
    ('ask', 'body', 'param'),
    [
        (completion, {'best_of': 1, 'n': 2}, 'best_of'),
        (completion, {'best_of': 2, 'stream': True}, 'best_of'),
        (completion, {'best_of': 65}, 'best_of'),
        (completion, {'prompt': ['a'] * 33, 'best_of': 2}, 'best_of'),
        (completion, {'prompt': 5}, 'prompt'),
        (completion, {'prompt': []}, 'prompt'),
        (completion, {'prompt': [[]]}, 'prompt'),
        (completion, {'prompt': [1, 'a']}, 'prompt'),
        (completion, {'prompt': ['a', 1]}, 'prompt'),
        (completion, {'prompt': [259]}, 'prompt'),
        (completion, {'prompt': [[-1]]}, 'prompt'),
        (completion, {'prompt': '\ud800'}, 'prompt'),
        (completion, {'prompt': ['a'] * 65}, 'prompt'),
        (completion, {'prompt': ['a'] * 33, 'n': 2}, 'n'),
        (completion, {'logprobs': True}, 'logprobs'),
        (completion, {'logprobs': 21}, 'logprobs'),
        (completion, {'max_tokens': 0}, 'max_tokens'),
        (completion, {'echo': 'yes'}, 'echo'),
        (completion, {'echo': True, 'logprobs': 1, 'prompt_logprobs': 2}, 'prompt_logprobs'),
        (completion, {'messages': []}, 'messages'),
        (completion, {'top_logprobs': 1}, 'top_logprobs'),
        (completion, {'suffix': 'end'}, 'suffix'),
        (chat, {'logprobs': 2}, 'logprobs'),
        (chat, {'top_logprobs': 2}, 'top_logprobs'),
        (chat, {'logprobs': True, 'top_logprobs': 21}, 'top_logprobs'),
        (chat, {'max_completion_tokens': -5}, 'max_completion_tokens'),
        (chat, {'prompt': 'hi'}, 'prompt'),
        (chat, {'echo': True}, 'echo'),
        (chat, {'stream': True, 'stream_options': {'x': 1}}, 'stream_options.x'),
        (chat, {'response_format': {'type': 'xml'}}, 'response_format.type'),
        (
            chat,
            {'response_format': {'type': 'json_schema', 'schema': {}}},
            'response_format.schema',
        ),
        (
            chat,
            {'response_format': {'type': 'json_schema', 'json_schema': {'name': 'n'}}},
            'response_format.json_schema.schema',
        ),
        (chat, {'regex': 'a', 'response_format': {'type': 'text'}}, 'regex'),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else '',
)
def test_refused_in_one_of_them(parts, ask, body, param):
    with pytest.raises(ApiError) as error:
        ask(parts, **body)
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    ('ask', 'body', 'param'),
    [
        (completion, {'prompt': 'a' * 60}, 'prompt'),
        (completion, {'max_tokens': 10**18}, 'prompt'),
        (chat, {'max_tokens': 64}, 'messages'),
        (chat, {'messages': [{'role': 'user', 'content': 'a' * 64}]}, 'messages'),
    ],
)
def test_too_long_for_the_context(parts, ask, body, param):
    with pytest.raises(ApiError) as error:
        ask(parts, **body)
    assert error.value.code == 'context_length_exceeded' and error.value.param == param
    assert 'at most 64' in error.value.message


@pytest.mark.parametrize(
    ('body', 'words'),
    [
        ({'n': 65}, 'n is 65: at most 64 in all'),
        ({'prompt': ['a', 'b'], 'best_of': 33}, 'best_of is 33 for 2 prompts: at most 64 in all'),
    ],
)
def test_too_many_choices_are_counted_over_all_prompts(parts, body, words):
    with pytest.raises(ApiError) as error:
        completion(parts, **body)
    assert error.value.message == words


def test_another_model(parts):
    assert completion(parts, model=fake.MODEL)
    with pytest.raises(ApiError, match='fake/bytes') as error:
        completion(parts, model='gpt-4')
    assert (error.value.status, error.value.code) == (404, 'model_not_found')


def test_chat_without_a_chat_format(engine):
    with pytest.raises(ApiError, match='no chat format'):
        chat((fake.served(engine(length=64), chat=None), Limits()))


def test_embeddings(parts):
    ask = schema.embeddings(*parts, {'input': ['ab', [1]], 'encoding_format': 'base64'})
    assert ask.inputs == ((97, 98), (1,)) and ask.base64
    for body, param in (
        ({}, 'input'),
        ({'input': ''}, 'input'),
        ({'input': 'a' * 65}, 'input'),
        ({'input': 'a', 'encoding_format': 'hex'}, 'encoding_format'),
        ({'input': 'a', 'dimensions': 8}, 'dimensions'),
    ):
        with pytest.raises(ApiError) as error:
            schema.embeddings(*parts, body)
        assert (error.value.status, error.value.param) == (400, param)

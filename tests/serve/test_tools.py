"""Tools as the openai client has them, over a model that is held by grammars: whatever its weights,
what is demanded is a call with valid arguments."""

import contextlib
import json

import jax
import numpy as np
import pytest

openai = pytest.importorskip('openai')

import jsonschema  # noqa: E402

from llama_jax import trees  # noqa: E402
from llama_jax.engine.engine import Engine  # noqa: E402
from llama_jax.generate.programs import Programs  # noqa: E402
from llama_jax.mesh import MeshConfig, make  # noqa: E402
from llama_jax.model import layers  # noqa: E402
from llama_jax.model.config import Compute, ModelConfig  # noqa: E402
from llama_jax.serve.app import build  # noqa: E402
from llama_jax.serve.grammar import Compiler  # noqa: E402
from llama_jax.serve.served import Served  # noqa: E402
from llama_jax.text.chat import end_ids  # noqa: E402
from llama_jax.text.template import Template  # noqa: E402
from tests.serve.asgi import post  # noqa: E402
from tests.serve.calling import BODY, HERMES, LLAMA3, MISTRAL, VOCABULARY, template  # noqa: E402
from tests.serve.conftest import running  # noqa: E402
from tests.serve.fake import FakeEngine, says, served  # noqa: E402

LENGTH = 512
CHAT = '/v1/chat/completions'
HI = [{'role': 'user', 'content': 'hi'}]
WEATHER = {
    'type': 'object',
    'properties': {
        'city': {'$ref': '#/$defs/city'},
        'days': {'type': 'integer', 'minimum': 0, 'maximum': 9},
    },
    'required': ['city', 'days'],
    '$defs': {'city': {'enum': ['Zürich', '北京', 'a "b" {']}},
}
"""References are within the schema of each function."""
TOOLS = [
    {
        'type': 'function',
        'function': {'name': 'weather', 'description': 'w', 'parameters': WEATHER},
    },
    {'type': 'function', 'function': {'name': '时间', 'strict': True}},
]


@pytest.fixture(scope='module')
def engine():
    ends = end_ids(HERMES, VOCABULARY)
    config = ModelConfig(
        vocab=VOCABULARY.vocab_size,
        **dict(dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, context=LENGTH),
    )
    rng = np.random.default_rng(0)
    params = trees.map_named(
        lambda path, x: rng.normal(size=x.shape).astype(np.float32), layers.abstract(config)
    )
    programs = Programs(
        *(config, params),
        mesh=make(MeshConfig(), jax.devices()[:1]),
        compute=Compute(),
        end_ids=ends,
        pad_id=0,
    )
    token_bytes = VOCABULARY.token_bytes
    engine = Engine(programs, token_bytes=token_bytes, rows=4, length=LENGTH, prefill_chunk=64)
    yield engine
    engine.close()


@pytest.fixture
def client(engine):
    """Makes a client of a server whose model has a chat template."""
    grammars = Compiler(VOCABULARY, vocab=VOCABULARY.vocab_size, end_ids=engine.programs.end_ids)
    with contextlib.ExitStack() as stack:

        def make_client(chat):
            made = Served('m', engine, VOCABULARY, chat=chat, make_grammar=grammars.make_grammar)
            app = build(made)
            # The engine serves the next test too.
            app.router.lifespan_context = lambda app: contextlib.nullcontext()
            url, _ = stack.enter_context(running(app))
            one = openai.OpenAI(base_url=f'{url}/v1', api_key='key', max_retries=0)
            stack.callback(one.close)
            return one

        yield make_client


def check(call):
    assert len(call.id) == 9 and call.id.isalnum() and call.type == 'function'
    arguments = json.loads(call.function.arguments)
    if call.function.name == 'weather':
        jsonschema.validate(arguments, WEATHER)
        assert arguments.keys() == {'city', 'days'}
    else:
        assert call.function.name == '时间' and arguments == {}
    return call.function.name


@pytest.mark.slow
@pytest.mark.parametrize('chat', [HERMES, LLAMA3, MISTRAL], ids=['hermes', 'llama3', 'mistral'])
def test_calls_are_demanded(client, chat):
    ask = client(chat).chat.completions
    demanded = {'model': 'm', 'messages': HI, 'tools': TOOLS, 'tool_choice': 'required', 'seed': 1}
    # Nearly any token that is allowed, and rather what goes on with another call.
    likely = {str(ord(char)): 40 for char in '\n;,'}
    told = ask.create(**demanded, n=12, temperature=20, logit_bias=likely, max_tokens=300)
    names, counts = set(), set()
    for choice in told.choices:
        if choice.finish_reason == 'length':
            continue
        assert choice.finish_reason == 'tool_calls' and choice.message.content is None
        names |= {check(call) for call in choice.message.tool_calls}
        counts.add(len(choice.message.tool_calls))
    assert names == {'weather', '时间'}
    assert counts == {1} if chat is LLAMA3 else len(counts) > 1
    one = ask.create(**demanded, n=8, temperature=20, logit_bias=likely, parallel_tool_calls=False)
    assert [len(choice.message.tool_calls) for choice in one.choices] == [1] * 8
    chosen = {'type': 'function', 'function': {'name': 'weather'}}
    named = ask.create(model='m', messages=HI, tools=TOOLS, tool_choice=chosen, n=4, seed=1)
    assert [[check(c) for c in choice.message.tool_calls] for choice in named.choices] == [
        ['weather']
    ] * 4
    # What was called, and what came of it, goes back to the model.
    message = one.choices[0].message
    call = message.tool_calls[0]
    answer = {'role': 'tool', 'tool_call_id': call.id, 'content': 'wet'}
    again = ask.create(model='m', messages=[*HI, message, answer], tools=TOOLS, max_tokens=1)
    assert again.usage.prompt_tokens > one.usage.prompt_tokens


@pytest.mark.slow
def test_a_stream_of_calls(client):
    with client(HERMES).chat.completions.stream(
        model='m', messages=HI, tools=TOOLS[:1], tool_choice='required', seed=3, max_tokens=300
    ) as stream:
        events = list(stream)
        (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == 'tool_calls' and choice.message.content is None
    assert {check(call) for call in choice.message.tool_calls} == {'weather'}
    done = [event for event in events if event.type == 'tool_calls.function.arguments.done']
    assert [event.index for event in done] == list(range(len(choice.message.tool_calls)))
    deltas = [
        call
        for event in events
        if event.type == 'chunk'
        for call in event.chunk.choices[0].delta.tool_calls or []
    ]
    assert deltas[0].function.name == 'weather' and deltas[0].function.arguments == ''
    assert deltas[1].id is None and deltas[1].function.name is None


@pytest.mark.slow
@pytest.mark.parametrize('chat', [HERMES, MISTRAL], ids=['hermes', 'mistral'])
def test_an_answer_in_a_format_or_calls(client, chat):
    answer = {'type': 'array', 'items': {'enum': [1, '二']}, 'minItems': 1, 'maxItems': 3}
    told = client(chat).chat.completions.create(
        **{'model': 'm', 'messages': HI, 'tools': TOOLS, 'n': 12, 'seed': 1, 'temperature': 20},
        response_format={'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': answer}},
        parallel_tool_calls=False,
        logit_bias={'9': -100, '10': -100, '32': -100},
    )
    ways = set()
    for choice in told.choices:
        message = choice.message
        if message.content is not None:
            jsonschema.validate(json.loads(message.content), answer)
        for call in message.tool_calls or ():
            check(call)
        assert (message.content is None) == bool(message.tool_calls)
        ways.add(choice.finish_reason)
    assert ways == {'stop', 'tool_calls'}


CALLED = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    '\n<tool_call>\n{"name": "时间", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
def app():
    """Makes an application whose model writes a text."""
    engines = []

    def make_app(text, chat=HERMES, **parts):
        engines.append(FakeEngine(script=says(text)))
        return build(served(engines[-1], chat=chat, **parts))

    yield make_app
    for engine in engines:
        engine.close()


def told(app, **body):
    return post(app, CHAT, {'messages': HI, 'tools': TOOLS, **body}).json()['choices'][0]


def test_calls_of_a_text(app):
    made = app(CALLED)
    for body in ({}, {'tool_choice': 'auto'}, {'parallel_tool_calls': True}):
        choice = told(made, **body)
        message = choice['message']
        assert choice['finish_reason'] == 'tool_calls' and message['content'] == 'I look.'
        assert [call['function']['name'] for call in message['tool_calls']] == ['weather', '时间']
        assert message['tool_calls'][0]['function']['arguments'] == '{"city": "北京"}'
        assert len({call['id'] for call in message['tool_calls']}) == 2
    (call,) = told(made, parallel_tool_calls=False)['message']['tool_calls']
    assert call['function']['name'] == 'weather'
    for body in ({'tool_choice': 'none'}, {'tools': []}, {'tools': TOOLS[1:], 'stop': ['</tool']}):
        choice = told(made, **body)
        assert choice['finish_reason'] == 'stop' and 'tool_calls' not in choice['message']
        assert choice['message']['content'].startswith(CALLED[:60]), 'what is no call stays'
    cut = told(made, max_tokens=100)
    assert cut['finish_reason'] == 'length' and len(cut['message']['tool_calls']) == 1
    half = told(made, max_tokens=20)
    assert half['message']['content'] == CALLED[:20] and half['finish_reason'] == 'length'


def test_streams_tell_what_whole_answers_tell(app):
    made = app(CALLED)
    for body in ({}, {'logprobs': True}, {'parallel_tool_calls': False}, {'max_tokens': 60}):
        whole = told(made, **body)
        asked = {'messages': HI, 'tools': TOOLS, 'stream': True, **body}
        events = [event['choices'][0] for event in post(made, CHAT, asked).events]
        first, *_ = (event['delta'] for event in events)
        assert first == {'role': 'assistant', 'content': None}
        text = ''.join(event['delta'].get('content') or '' for event in events)
        assert text == (whole['message']['content'] or '')
        deltas = [call for event in events for call in event['delta'].get('tool_calls', [])]
        calls = {}
        for delta in deltas:
            call = calls.setdefault(delta['index'], {'name': '', 'arguments': ''})
            for key, value in delta['function'].items():
                call[key] += value
        assert [*calls.values()] == [c['function'] for c in whole['message'].get('tool_calls', [])]
        assert events[-1]['finish_reason'] == whole['finish_reason']
        scored = [one for event in events for one in (event['logprobs'] or {}).get('content', [])]
        assert scored == (whole['logprobs'] or {'content': []})['content']
        assert bool(scored) == ('logprobs' in body)


def test_a_long_call_does_not_leave_the_line_silent(app, monkeypatch):
    monkeypatch.setattr('llama_jax.serve.answers.KEEP_ALIVE_SECONDS', 0)
    asked = {'messages': HI, 'tools': TOOLS, 'stream': True}
    answer = post(app(CALLED), CHAT, asked)
    assert answer.body.count(b': waiting') > 20 and len(answer.events) < 20


def test_calls_in_thoughts(app):
    source = HERMES.source.replace(
        '<|im_start|>assistant\n{%', '<|im_start|>assistant\n<think>\n{%'
    )
    text = f'{CALLED}</think>{CALLED}'
    message = told(app(text, Template(source, {})))['message']
    assert len(message['tool_calls']) == 2
    assert message['content'] == f'{CALLED}</think>I look.'


def test_calls_that_are_not_known_stay(app):
    choice = told(app(CALLED, template('{{ c | tojson }}')))
    assert choice['message']['content'] == CALLED and choice['finish_reason'] == 'stop'


NAMED = {'type': 'function', 'function': {'name': 'weather'}}


@pytest.mark.parametrize(
    ('body', 'param', 'message'),
    [
        ({'tool_choice': 'any'}, 'tool_choice', "give 'none', 'auto', 'required' or"),
        ({'tool_choice': {'type': 'function'}}, 'tool_choice', "give 'none', 'auto', 'required'"),
        ({'tool_choice': {'type': 'custom', **NAMED['function']}}, 'tool_choice', 'give'),
        ({'tool_choice': {'type': 'function', 'function': {'name': 'x'}}}, 'tool_choice', "'x'"),
        ({'tool_choice': 'required', 'tools': []}, 'tool_choice', 'without tools'),
        ({'tool_choice': NAMED, 'tools': []}, 'tool_choice', 'none of tools'),
        ({'tool_choice': 'required', 'regex': 'a'}, 'regex', 'demands calls'),
        (
            {'tool_choice': NAMED, 'response_format': {'type': 'json_object'}},
            *('response_format', 'demands calls'),
        ),
        ({'tool_choice': NAMED, 'continue_final_message': True}, 'continue_final_message', 'calls'),
        ({'regex': '('}, 'regex', 'unclosed group'),
        ({'tool_choice': 'required', 'min_tokens': 3}, 'min_tokens', 'goes against the grammar'),
        ({'parallel_tool_calls': 1}, 'parallel_tool_calls', 'true or false'),
        ({'tools': [*TOOLS, TOOLS[0]]}, 'tools[2].function.name', 'given twice'),
        ({'tools': [{**NAMED, 'type': 'custom'}]}, 'tools[0]', 'is no function'),
        (
            {'tools': [{'type': 'function', 'function': {'name': 'f', 'parameters': []}}]},
            *('tools[0].function.parameters', "no JSON schema of type 'object'"),
        ),
        (
            {
                'tools': [
                    {'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'array'}}}
                ]
            },
            *('tools[0].function.parameters', "no JSON schema of type 'object'"),
        ),
        ({'functions': [{'name': 'f'}]}, 'functions', 'give tools'),
    ],
)
def test_refused(app, body, param, message):
    grammars = Compiler(VOCABULARY, vocab=VOCABULARY.vocab_size, end_ids=(256,))
    made = app(CALLED, make_grammar=grammars.make_grammar)
    answer = post(made, CHAT, {'messages': HI, 'tools': TOOLS, **body})
    assert answer.status == 400 and answer.error['param'] == param
    assert message in answer.error['message'] and '\n' not in answer.error['message']


@pytest.mark.parametrize('empty', [{'regex': ''}, {'response_format': {}}])
def test_an_empty_format_asks_for_nothing(app, empty):
    grammars = Compiler(VOCABULARY, vocab=VOCABULARY.vocab_size, end_ids=(256,))
    made = app(CALLED, LLAMA3, make_grammar=grammars.make_grammar)
    for choice in ('auto', 'required'):
        body = {'messages': HI, 'tools': TOOLS, 'tool_choice': choice}
        assert post(made, CHAT, {**body, **empty}).status == 200


def test_refused_for_the_model(app):
    demanded = {'messages': HI, 'tools': TOOLS, 'tool_choice': 'required'}
    for chat, body, param, message in (
        (Template(BODY), {}, 'tools', 'the chat template ignores tools'),
        (template('{{ c | tojson }}'), demanded, 'tool_choice', 'is not known'),
        (HERMES, demanded, 'tool_choice', 'is not supported'),  # there are no grammars
        (HERMES, {'regex': 'a'}, 'regex', 'is not supported'),
        (LLAMA3, {'regex': 'a'}, 'regex', "set tool_choice to 'none'"),
        (template('{{ c | tojson }}'), {'regex': 'a'}, 'regex', "set tool_choice to 'none'"),
    ):
        answer = post(app(CALLED, chat), CHAT, {'messages': HI, 'tools': TOOLS, **body})
        assert answer.status == 400 and answer.error['param'] == param
        assert message in answer.error['message']


def test_a_schema_that_cannot_be_held_is_named(app):
    grammars = Compiler(VOCABULARY, vocab=VOCABULARY.vocab_size, end_ids=(256,))
    made = app(CALLED, make_grammar=grammars.make_grammar)
    bad = {'name': 'f', 'parameters': {'properties': {'a': {'not': {}}}}}
    tools = [*TOOLS, {'type': 'function', 'function': bad}]
    answer = post(made, CHAT, {'messages': HI, 'tools': tools, 'tool_choice': 'required'})
    assert answer.status == 400 and answer.error['param'] == 'tools'
    assert "the parameters of 'f'" in answer.error['message'] and 'not' in answer.error['message']
    assert post(made, CHAT, {'messages': HI, 'tools': tools}).status == 200, 'nothing holds it'

"""Chats of requests: what reaches the model's format, and what is refused by name."""

import pytest

from llama_jax.serve import schema
from llama_jax.serve.body import Fields
from llama_jax.serve.errors import ApiError
from llama_jax.serve.messages import conversation_of
from llama_jax.serve.served import Limits
from llama_jax.serve.tools import Tools, tools_of
from llama_jax.text.template import Template
from tests.serve import fake
from tests.serve.asgi import post
from tests.serve.fake import BOS, Bytes

HI = [{'role': 'user', 'content': 'hi'}]
TOOL = {'type': 'function', 'function': {'name': 'f', 'parameters': {}}}
WHOLE = (
    '{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}'
    '{{ documents | tojson }}'
    '{{ enable_thinking }}{% if add_generation_prompt %}#{% endif %}'
)


@pytest.fixture
def parts(engine):
    return fake.served(engine(length=500)), Limits()


def text_of(parts, **body):
    ids = schema.chat(*parts, {'messages': HI, **body}, 'me').prompts[0].ids
    assert ids[0] == BOS and ids.count(BOS) == 1
    return Bytes().decode(ids)


def made(**body):
    """The conversation of a body, for a template that knows everything."""
    fields = Fields({'messages': HI, **body}, known={'messages', *schema.CONVERSATION_FIELDS})
    template = Template(WHOLE + 'developer')
    return conversation_of(fields, template, tools_of(fields, template))


def test_messages(parts):
    pieces = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
    messages = [
        {'role': 'developer', 'content': 'S'},
        {'role': 'user', 'content': pieces},
        {'role': 'user', 'content': 'again'},
        {'role': 'assistant', 'content': '', 'refusal': None, 'annotations': [], 'tool_calls': []},
        {'role': 'ipython', 'content': '4'},
        {'role': 'system', 'content': 'late'},
    ]
    assert text_of(parts, messages=messages) == (
        'system: S\nuser: ab\nuser: again\nassistant: \nipython: 4\nsystem: late\nassistant: '
    )
    assert made(messages=messages[:1]).messages == [messages[0]]  # a role that this one knows


def test_messages_that_clients_send_back():
    """What was answered, with all that a client keeps beside it."""
    dumped = {
        **{'role': 'assistant', 'content': 'x', 'refusal': None, 'function_call': None},
        **{'audio': None, 'annotations': [{'type': 'url_citation'}], 'parsed': {'a': 1}},
        **{'tool_calls': None, 'provider_specific_fields': {}, 'id': 'm1', 'images': []},
    }
    part = {'type': 'text', 'text': 'a', 'cache_control': {'type': 'ephemeral'}}
    told = made(
        messages=[
            {'role': 'user', 'content': [part], 'name': 'ann'},
            dumped,
            {'role': 'assistant', 'content': None, 'refusal': 'no'},
            {'role': 'assistant', 'content': [{'type': 'refusal', 'refusal': 'never'}]},
            {'role': 'assistant', 'content': None, 'name': ''},
        ]
    ).messages
    assert told == [
        {'role': 'user', 'content': [{'type': 'text', 'text': 'a'}], 'name': 'ann'},
        {'role': 'assistant', 'content': 'x'},
        {'role': 'assistant', 'content': 'no'},
        {'role': 'assistant', 'content': [{'type': 'text', 'text': 'never'}]},
        {'role': 'assistant', 'content': ''},
    ]


def test_how_the_prompt_ends(parts):
    assert text_of(parts, add_generation_prompt=False) == 'user: hi\n'
    assert text_of(parts, continue_final_message=True) == 'user: hi'
    assert text_of(parts, continue_final_message=True, add_generation_prompt=False) == 'user: hi'


def test_calls_and_answers_of_tools():
    call = {'name': 'f', 'arguments': '{"a": [1, "ü"]}'}
    messages = [
        *HI,
        {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 'c1', 'function': call}]},
        {'role': 'tool', 'tool_call_id': 'c1', 'name': 'f', 'content': '2'},
        {'role': 'assistant', 'content': 'x', 'reasoning_content': 'thought'},
    ]
    assert made(messages=messages, tools=[TOOL]).messages == [
        HI[0],
        {
            'role': 'assistant',
            'content': None,
            'tool_calls': [
                {
                    'id': 'c1',
                    'type': 'function',
                    'function': {'name': 'f', 'arguments': {'a': [1, 'ü']}},
                }
            ],
        },
        {'role': 'tool', 'content': '2', 'name': 'f', 'tool_call_id': 'c1'},
        messages[3],
    ]
    assert [*made(messages=messages).messages[1]['tool_calls'][0]] == ['id', 'type', 'function']
    for arguments in ('', None, {}):
        call = {'function': {'name': 'f', 'arguments': arguments}}
        messages[1] = {'role': 'assistant', 'tool_calls': [call]}
        made_call = made(messages=messages).messages[1]['tool_calls'][0]
        assert made_call['function'] == {'name': 'f', 'arguments': {}}


def test_what_a_template_knows(parts):
    documents = [{'title': 'a', 'text': 'b'}]
    body = {'tools': [TOOL], 'documents': documents, 'chat_template_kwargs': {'x': 1}}
    text = text_of(parts, **body)
    for name, value in (('tools', [TOOL]), ('documents', documents), ('variables', {'x': 1})):
        assert f'{name} {value}\n' in text
    assert made(tools=[TOOL], tool_choice='auto').tools == [TOOL]
    assert made(tools=[TOOL], tool_choice='none').tools is None
    assert made(tools=[], tool_choice='none').tools is None
    assert made(tool_choice='auto').tools is None
    assert made(chat_template_kwargs={'enable_thinking': False}).variables == {
        'enable_thinking': False
    }


def test_reasoning_effort_is_for_templates_that_read_it():
    def variables(source, **body):
        fields = Fields({'messages': HI, **body}, known={'messages', *schema.CHAT_FIELDS})
        return conversation_of(fields, Template(source), Tools()).variables

    assert variables('{{ reasoning_effort }}', reasoning_effort='low') == {
        'reasoning_effort': 'low'
    }
    own = {'reasoning_effort': 'low', 'chat_template_kwargs': {'reasoning_effort': 'high'}}
    assert variables('{{ reasoning_effort }}', **own) == {'reasoning_effort': 'high'}
    assert variables('', reasoning_effort='low') == {}


def one(**message):
    return {'messages': [{'role': 'user', 'content': 'x', **message}]}


def called(**function):
    return one(role='assistant', tool_calls=[{'function': {'name': 'f', **function}}])


@pytest.mark.parametrize(
    ('body', 'param'),
    [
        ({'messages': None}, 'messages'),
        ({'messages': []}, 'messages'),
        ({'messages': ['hi']}, 'messages[0]'),
        ({'messages': [{'content': 'hi'}]}, 'messages[0].role'),
        (one(role=3), 'messages[0].role'),
        (one(role=' '), 'messages[0].role'),
        ({'messages': [{'role': 'user'}]}, 'messages[0].content'),
        (one(content=3), 'messages[0].content'),
        (one(content=[{'type': 'image_url', 'image_url': {}}]), 'messages[0].content[0].type'),
        (one(content=[{'type': 'text', 'text': 'a', 'x': 1}]), 'messages[0].content[0].x'),
        (one(content=[{'type': 'text', 'text': 1}]), 'messages[0].content[0].text'),
        (one(content=[1]), 'messages[0].content[0]'),
        (one(annotation=[1]), 'messages[0].annotation'),
        (one(audio={'id': 'a'}), 'messages[0].audio'),
        (one(function_call={'name': 'f'}), 'messages[0].function_call'),
        (one(role='user', content=None), 'messages[0].content'),
        (one(name=1), 'messages[0].name'),
        (one(tool_calls={'a': 1}), 'messages[0].tool_calls'),
        (one(tool_calls=[1]), 'messages[0].tool_calls[0]'),
        (one(tool_calls=[{'id': [1], 'function': {'name': 'f'}}]), 'messages[0].tool_calls[0].id'),
        (one(tool_calls=[{'function': 'f'}]), 'messages[0].tool_calls[0]'),
        (called(name=''), 'messages[0].tool_calls[0].function.name'),
        (called(arguments='{'), 'messages[0].tool_calls[0].function.arguments'),
        (called(arguments='[]'), 'messages[0].tool_calls[0].function.arguments'),
        (called(x=1), 'messages[0].tool_calls[0].function.x'),
        ({'tools': [1]}, 'tools[0]'),
        ({'tools': [{'type': 'web_search'}]}, 'tools[0]'),
        ({'tools': [{'type': 'function', 'function': {}}]}, 'tools[0].function.name'),
        ({'tool_choice': 'required'}, 'tool_choice'),
        ({'tools': [TOOL], 'tool_choice': 'required'}, 'tool_choice'),
        ({'tools': [TOOL], 'tool_choice': TOOL}, 'tool_choice'),
        ({'documents': ['a']}, 'documents[0]'),
        ({'chat_template_kwargs': []}, 'chat_template_kwargs'),
        ({'chat_template_kwargs': {'tools': []}}, 'chat_template_kwargs.tools'),
        (
            {'add_generation_prompt': True, 'continue_final_message': True},
            'add_generation_prompt',
        ),
        ({**one(content=''), 'continue_final_message': True}, 'messages'),
        (one(role='nobody'), 'messages'),
    ],
    ids=lambda x: str(x)[:60] if isinstance(x, dict) else '',
)
def test_refused(parts, body, param):
    with pytest.raises(ApiError) as error:
        text_of(parts, **body)
    assert (error.value.status, error.value.param) == (400, param)


def test_refusal_of_the_template_is_the_answer(app):
    source = "{{ raise_exception('Roles must alternate.') }}"
    made_app = app(parts={'chat': Template(source)})
    answer = post(made_app, '/v1/chat/completions', {'messages': HI})
    assert answer.status == 400
    assert answer.error['message'] == 'the chat template refuses: Roles must alternate.'
    assert answer.error['param'] == 'messages'


def test_a_template_of_the_model(app):
    source = '{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}'
    made_app = app(parts={'chat': Template(source)})
    answer = post(made_app, '/v1/chat/completions', {'messages': HI, 'max_tokens': 3})
    assert answer.status == 200
    (request,) = made_app.state.service.served.engine.requests
    assert bytes(request.prompt) == b'<user>hi'  # no begin token: it writes none
    for body in ({'tools': [TOOL]}, {'chat_template_kwargs': {'x': 1}}):
        answer = post(made_app, '/v1/chat/completions', {'messages': HI, **body})
        assert answer.status == 400 and 'the chat template' in answer.error['message']


@pytest.mark.parametrize(
    ('dummy_prefix', 'body', 'text'),
    [
        (True, {}, 'yes no'),
        (True, {'continue_final_message': True}, ' yes no'),  # it goes on with the text there
        (True, {'add_generation_prompt': False}, ' yes no'),
        (False, {}, ' yes no'),
    ],
)
def test_an_answer_begins_without_the_space_of_its_tokenizer(
    app, monkeypatch, dummy_prefix, body, text
):
    monkeypatch.setattr(Bytes, 'dummy_prefix', dummy_prefix)
    made_app = app(script=fake.says(' yes no'))
    answer = post(made_app, '/v1/chat/completions', {'messages': HI, **body}).json()
    assert answer['choices'][0]['message']['content'] == text
    whole = post(made_app, '/v1/completions', {'prompt': 'hi'}).json()
    assert whole['choices'][0]['text'] == ' yes no'

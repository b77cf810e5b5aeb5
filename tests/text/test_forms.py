"""Conversations with calls, as clients send them, in templates that take different forms."""

import pytest

from llama_jax.errors import UserError
from llama_jax.text.chat import Conversation
from llama_jax.text.template import Template
from tests.text.chats import plain

CALL = {'id': 'c1', 'type': 'function', 'function': {'name': 'f', 'arguments': {'a': ['ü', None]}}}
ANSWER = {'role': 'tool', 'tool_call_id': 'c1', 'content': 'wet'}
SAID = [
    {'role': 'user', 'content': 'x'},
    {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
    ANSWER,
]
NAMED = [*SAID[:2], {**ANSWER, 'name': 'f'}]
SILENT = [SAID[0], {**SAID[1], 'content': ''}, *SAID[2:]]
TEXT = [
    SAID[0],
    {
        **SAID[1],
        'tool_calls': [{**CALL, 'function': {'name': 'f', 'arguments': '{"a": ["ü", null]}'}}],
    },
    *SAID[2:],
]


def loop(call='{{ c.function.name }}', content='{{ m.content or "" }}', tool=''):
    calls = f'{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}'
    return f'{{% for m in messages %}}<{{{{ m.role }}}}>{content}{calls}{tool}{{% endfor %}}'


AS_JSON = loop('{{ c.function.arguments | tojson }}')
JOINED = loop('{{ c.function.name + c.function.arguments }}')
PRINTED = loop('{{ c.function.name }}{{ c.function.arguments }}')
STRICT = '{% if m.role == "tool" and not m.name %}{{ raise_exception("no name") }}{% endif %}'
CASES = {
    'objects': (AS_JSON, SAID),
    'text alone': (JOINED, TEXT),
    'text that is printed': (PRINTED, TEXT),
    'a content that is added': (loop(content='{{ m.content + "" }}'), SILENT),
    'a name that is asked for': (loop(tool=STRICT + '{{ m.name }}'), NAMED),
    'a name that is not asked for': (loop(tool='{{ m.name }}'), SAID),
    'all of it': (
        loop('{{ c.function.name + c.function.arguments }}', '{{ m.content + "" }}', STRICT),
        [SAID[0], {**TEXT[1], 'content': ''}, NAMED[2]],
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_the_first_form_that_the_template_takes(name):
    source, form = CASES[name]
    assert Template(source).render(Conversation(SAID)) == plain(source, form)
    assert SAID[1]['content'] is None and 'name' not in ANSWER, 'what was given stays'


def test_a_tool_that_says_arguments_as_python_spells_them_changes_nothing():
    """LangGraph's ToolNode tells an error so."""
    said = f'Error invoking tool f with kwargs {CALL["function"]["arguments"]}: give a number'
    for content in (said, [{'type': 'text', 'text': said}]):
        asked = [*SAID[:2], {**ANSWER, 'content': content}]
        told = [*SAID[:2], {**ANSWER, 'content': said}]
        assert Template(AS_JSON).render(Conversation(asked)) == plain(AS_JSON, told)
    # A template that prints them itself is still found out.
    told = [*TEXT[:2], {**ANSWER, 'content': said}]
    asked = [*SAID[:2], {**ANSWER, 'content': said}]
    assert Template(PRINTED).render(Conversation(asked)) == plain(PRINTED, told)


def test_what_no_form_makes_right():
    refusing = loop(content='{{ raise_exception("no tools") if m.tool_calls }}{{ m.content + "" }}')
    for source, message in (
        (refusing, 'the chat template refuses: no tools'),
        (loop('{{ c.function.nothing.x }}'), 'fails .UndefinedError.'),
        # A template that knows no calls: the model would read an answer that says nothing.
        (loop(call='', content='{{ m.content + "" }}'), 'message 1 has no content: give it one'),
    ):
        with pytest.raises(UserError, match=message) as error:
            Template(source).render(Conversation(SAID))
        assert '\n' not in str(error.value)


def test_calls_in_another_shape_stay():
    flat = {'name': 'f', 'arguments': {'a': 1}}
    said = [SAID[0], {'role': 'assistant', 'content': None, 'tool_calls': [flat, CALL]}]
    source = loop('{{ c | tojson }}', '{{ m.content + "" }}')
    told = Template(source).render(Conversation(said))
    assert told == plain(source, [said[0], {**said[1], 'content': ''}])

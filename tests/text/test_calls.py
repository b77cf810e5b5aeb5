"""Calls in what models write: real spellings of them, cut at every place."""

import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.text.calls import (
    FALCON3,
    HERMES,
    LLAMA3,
    MISTRAL,
    Call,
    CallParser,
    call_format,
)
from llama_jax.text.chat import FORMATS
from llama_jax.text.template import Template

NAMES = ('search', 'weather', '天气')


def parsed(format_, pieces, **options):
    """The text, and the calls, of a text that arrives in pieces."""
    parser = CallParser(format_, NAMES, **options)
    parts = [part for piece in pieces for part in parser(piece)] + parser.finish()
    text = ''.join(part for part in parts if isinstance(part, str))
    calls = [part for part in parts if isinstance(part, Call)]
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


def one(name='search', key='arguments', **arguments):
    return f'{{"name": "{name}", "{key}": {json.dumps(arguments, ensure_ascii=False)}}}'


def tagged(text):
    return f'<tool_call>\n{text}\n</tool_call>'


CATS, DOGS = ('search', {'q': 'cats'}), ('weather', {'q': 'dogs'})
# What it is, the text, and what stays of it; the calls are those that follow.
TEXTS = {
    'hermes': (HERMES, tagged(one(q='cats')), '', [CATS]),
    'without line breaks': (HERMES, f'<tool_call>{one(q="cats")}</tool_call>', '', [CATS]),
    'text before': (HERMES, f'I look.\n\n{tagged(one(q="cats"))}\n', 'I look.', [CATS]),
    'text behind': (HERMES, f'A\n{tagged(one(q="cats"))}\n\nB', 'A\n\n\nB', [CATS]),
    'text only behind': (HERMES, f'{tagged(one(q="cats"))}\n\nB', 'B', [CATS]),
    'two': (
        HERMES,
        f'{tagged(one(q="cats"))}\n{tagged(one("weather", q="dogs"))}',
        '',
        [CATS, DOGS],
    ),
    'array in tags': (
        FALCON3,
        tagged(f'[\n {one(q="cats")},\n {one("weather", q="dogs")}]'),
        '',
        [CATS, DOGS],
    ),
    'mistral': (MISTRAL, f'[TOOL_CALLS] [{one(q="cats")[:-1]}, "id": "abcdefghi"}}]', '', [CATS]),
    'mistral without blank': (MISTRAL, f'Hm [TOOL_CALLS][{one(q="cats")}]', 'Hm', [CATS]),
    'no end tag': (HERMES, f'<tool_call>\n{one(q="cats")}', '', [CATS]),
    'half an end tag': (HERMES, f'<tool_call>\n{one(q="cats")}\n</tool', '', [CATS]),
    'tag in a string': (
        HERMES,
        tagged(one(q='a </tool_call> b <tool_call>')),
        '',
        [('search', {'q': 'a </tool_call> b <tool_call>'})],
    ),
    'brackets in a string': (
        LLAMA3,
        one(q='mkdir {a,b[" \\', key='parameters'),
        '',
        [('search', {'q': 'mkdir {a,b[" \\'})],
    ),
    'no arguments': (HERMES, tagged(one()), '', [('search', {})]),
    'null arguments': (
        HERMES,
        tagged('{"name": "search", "arguments": null}'),
        '',
        [('search', {})],
    ),
    'arguments first': (
        HERMES,
        tagged('{ "arguments": {"q": "cats"}, "name": "search"}'),
        '',
        [CATS],
    ),
    'json in json': (
        HERMES,
        tagged('{"name": "search", "arguments": "{\\"q\\": \\"cats\\"}"}'),
        '',
        [CATS],
    ),
    'a line break in a string': (
        HERMES,
        tagged('{"name": "search", "arguments": {"q": "a\n\tb"}}'),
        '',
        [('search', {'q': 'a\n\tb'})],
    ),
    'chinese': (HERMES, tagged(one('天气', 城市='北京 🙂')), '', [('天气', {'城市': '北京 🙂'})]),
    'thoughts': (
        HERMES,
        f'<think>\nOr {tagged(one(q="no"))}?\n</think>\n{tagged(one(q="cats"))}',
        f'<think>\nOr {tagged(one(q="no"))}?\n</think>',
        [CATS],
    ),
    'llama 3': (LLAMA3, one(q='cats', key='parameters'), '', [CATS]),
    'llama 3 with a type': (
        LLAMA3,
        '{"type": "function", "name": "search", "parameters": {"q": "cats"}}',
        '',
        [CATS],
    ),
    'llama 3 with the other key': (LLAMA3, one(q='cats'), '', [CATS]),
    'llama 3 between texts': (
        LLAMA3,
        f'The result: {one(q="cats")} More?',
        'The result:  More?',
        [CATS],
    ),
    'llama 3 twice': (LLAMA3, f'{one(q="cats")} ; {one("weather", q="dogs")}', '', [CATS, DOGS]),
    'llama 3 in lines': (
        LLAMA3,
        f'{one(q="cats")}\n{one("weather", q="dogs")}\n',
        '',
        [CATS, DOGS],
    ),
    'llama 3 behind braces': (
        LLAMA3,
        f'if (x) {{ y }} {{"a": 1}} {one(q="cats")}',
        'if (x) { y } {"a": 1}',
        [CATS],
    ),
    'llama 3 within an object': (LLAMA3, f'{{"name": {one(q="cats")}', '{"name":', [CATS]),
    'llama 3 in braces': (LLAMA3, f'{{{one(q="cats")}}}', '{}', [CATS]),
    'a tag in front': (LLAMA3, f'Hm <|python_tag|>{one(q="cats")}', 'Hm', [CATS]),
    'nested': (
        LLAMA3,
        one(a={'b': [{'c': [{}]}]}, key='parameters'),
        '',
        [('search', {'a': {'b': [{'c': [{}]}]}})],
    ),
}
# What is no call stays as it is.
STAYS = {
    'text': (HERMES, ' Hi! \n a < b <tool <tool_ca'),
    'text of braces': (LLAMA3, 'f() { return {"x": {}} } {'),
    'another name': (HERMES, tagged(one('delete'))),
    'another name among them': (FALCON3, tagged(f'[{one(q="cats")}, {one("delete")}]')),
    'another name without tags': (LLAMA3, one('John', key='parameters')),
    'no name': (LLAMA3, '{"parameters": {"q": 1}}'),
    'name that is no text': (HERMES, tagged('{"name": 3, "arguments": {}}')),
    'no arguments at all': (LLAMA3, '{"name": "search"}'),
    'arguments that are no object': (HERMES, tagged('{"name": "search", "arguments": [1]}')),
    'arguments that are a text': (HERMES, tagged('{"name": "search", "arguments": "cats"}')),
    'cut off': (HERMES, '<tool_call>\n{"name": "search", "arguments": {"q": "cats"}'),
    'cut off in a string': (LLAMA3, '{"name": "search", "parameters": {"q": "ca\\'),
    'no json': (LLAMA3, '{"name": "search", "parameters": {invalid}}'),
    'no number': (HERMES, tagged('{"name": "search", "arguments": {"q": NaN}}')),
    'too large a number': (HERMES, tagged('{"name": "search", "arguments": {"q": 1e999}}')),
    'two braces': (HERMES, tagged('{{"name": "search", "arguments": {}}}')),
    'a word in the tags': (HERMES, tagged('search')),
    'text before the end tag': (HERMES, f'<tool_call>{one()} x</tool_call>'),
    'an empty array': (FALCON3, tagged('[]')),
    'python': (LLAMA3, 'search.call(q="cats")'),
    'python behind a tag': (LLAMA3, '<|python_tag|>print({1: 2})'),
    'deep': (LLAMA3, '{"name": "search", "parameters": ' + '[' * 20_000 + ']' * 20_000 + '}'),
}


@pytest.mark.parametrize('name', TEXTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_calls_however_the_text_is_cut(name, data):
    format_, text, rest, calls = TEXTS[name]
    assert parsed(format_, [text]) == (rest, calls)
    assert parsed(format_, text) == (rest, calls), 'character by character'
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=4).map(sorted))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert parsed(format_, pieces) == (rest, calls)


@pytest.mark.parametrize('name', STAYS)
def test_what_is_no_call_stays(name):
    format_, text = STAYS[name]
    assert parsed(format_, [text]) == parsed(format_, text) == (text, [])


def test_text_is_told_as_it_comes_and_a_call_when_it_is_closed():
    parser = CallParser(HERMES, NAMES)
    assert parser('I look. ') == ['I look.'] and parser('Now <') == [' Now']
    assert parser('b> ') == [' <b>']
    text = tagged(one(q='cats'))
    assert parser(text[:-1]) == [] and parser(text[-1]) == [Call('search', '{"q": "cats"}')]
    assert parser(tagged(one('天气', q='北'))) == [Call('天气', '{"q": "北"}')]
    parser = CallParser(LLAMA3, NAMES)
    assert parser('x {') == ['x'] and parser('\n') == [] and parser('"na') == []
    held = ''.join(map(str, parser('ture": 1}')))
    assert held == ' {\n"nature": 1}', 'held back no longer than it may be a call'


def test_one_call_at_most():
    text = f'A {tagged(one(q="cats"))} B {tagged(one("weather", q="dogs"))} C'
    assert parsed(HERMES, [text], most=1) == parsed(HERMES, text, most=1) == ('A', [CATS])
    both = tagged(f'[{one(q="cats")}, {one("weather", q="dogs")}]')
    assert parsed(FALCON3, [both], most=1) == ('', [CATS])


def test_a_text_that_begins_in_thoughts():
    text = f'{tagged(one(q="no"))}</think>{tagged(one(q="cats"))}'
    rest = f'{tagged(one(q="no"))}</think>'
    assert parsed(HERMES, text, thinking=True) == (rest, [CATS])


def test_much_that_is_held_back_takes_no_quadratic_time():
    text = one(q='{' * 200_000, key='parameters')
    pieces = [text[i : i + 20] for i in range(0, len(text), 20)]
    assert parsed(LLAMA3, pieces)[1] == [('search', {'q': '{' * 200_000})]


@pytest.mark.parametrize(
    ('format_', 'begun'), [(LLAMA3, '{"name": '), (HERMES, '<tool_call>{"name": ')]
)
def test_objects_within_objects_take_no_quadratic_time(format_, begun):
    """A client may make a model write them, and its stream shares a thread with others."""
    begin = time.process_time()
    for closed in ('', '}' * 8000):
        text = begun * 8000 + '1' + closed
        assert parsed(format_, [text]) == (text, [])
    assert time.process_time() - begin < 5, 'it would take minutes'
    nested = begun * 6 + format_.opening + one(key=format_.key, q='cats') + format_.closing
    assert parsed(format_, [nested])[1] == [CATS], 'behind a few it is found'


def test_the_format_is_that_of_the_template():
    loop = '{% for m in messages %}{{ m.content }}{% endfor %}'
    for source, format_ in (
        ('{"name": ..., "arguments": ...} within <tool_call></tool_call> tags', HERMES),
        ("{{ '\\n<tool_call>\\n[' }}", FALCON3),
        ('{{ "<tool_call>" }}\n<tool_call>\n[', FALCON3),
        ('<tool_call>\n<function=example>', None),
        ('[TOOL_CALLS] [', MISTRAL),
        ('[TOOL_CALLS]f[ARGS]{', None),
        ('Environment: ipython {"name": "f", "parameters": {}}', LLAMA3),
        ('{"name": "f", "parameters": {}}', None),
        ('', None),
    ):
        assert call_format(Template(source + loop)) is format_, source
    assert {call_format(chat) for chat in FORMATS.values()} == {None}
    named = Template(loop, named={'tool_use': '<tool_call>' + loop})
    assert call_format(named) is HERMES

"""Chat templates that refuse, fail, or cannot run: one line each."""

import pytest

from llama_jax.errors import UserError
from llama_jax.text.chat import Conversation
from llama_jax.text.template import Template
from tests.text.chats import Bytes

SAID = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]


def rendered(source):
    return Template(source, {}).encode(Conversation(SAID), Bytes())


def test_refusal_of_a_template():
    source = "{{ raise_exception('Roles must alternate:\n' + messages[0].role) }}"
    with pytest.raises(UserError) as refused:
        rendered(source)
    assert str(refused.value) == 'the chat template refuses: Roles must alternate: system'


@pytest.mark.parametrize(
    ('source', 'named'),
    [
        ('{% for %}', 'is no Jinja (line 1'),
        ('{% if x %}', 'is no Jinja'),
        ('{{ "a" + 1 }}', 'fails (TypeError)'),
        ('{{ x.y.z }}', "fails (UndefinedError): 'x' is undefined"),
        ('{{ messages | urlize }}', "No filter named 'urlize'"),
        ('{{ lipsum() }}', "'lipsum' is undefined"),
        ('{% include "a" %}', 'fails (TypeError): no loader'),
        ('(' * 9 + '{{ ' + '(' * 9999 + '1' + ')' * 9999 + ' }}', 'nested too deeply'),
        ('a' * (1 << 18) + 'a', 'at most 262144'),
        ("{{ ('a'.format).args[0].from_string('') }}", "'function object' has no attribute 'args'"),
        ("{{ 'a'.x.y }}", "'str object' has no attribute 'x'"),
        ("{{ ''.__class__ }}{{ ''.__class__.mro() }}", 'fails (SecurityError)'),
        ('{{ messages.append(1) }}', 'fails (SecurityError)'),
        ("{{ 'a'.encode() }}", 'calls Marked.encode, which is not supported'),
        ('{{ (1).to_bytes(9999999999) }}', 'calls int.to_bytes'),
        ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'calls itself without end'),
        ('{% set ns = namespace(a=1) %}{{ ns }}', 'prints a namespace'),
    ],
)
def test_templates_that_fail(source, named):
    with pytest.raises(UserError) as refused:
        rendered(source)
    assert named in str(refused.value) and '\n' not in str(refused.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'jinja2', None)
    with pytest.raises(UserError, match=r"takes jinja2: pip install -e '.\[weights\]'"):
        rendered('{# not seen before #}')

"""Templates that would take all time or memory are stopped."""

import time
import tracemalloc

import pytest

from llama_jax.errors import UserError
from llama_jax.text import budget
from llama_jax.text.chat import Conversation
from llama_jax.text.template import Template

SAID = Conversation([{'role': 'user', 'content': 'Hi'}])
BOMBS = {
    'range': '{% for i in range(10 ** 9) %}a{% endfor %}',
    'loops': '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    'calls': '{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else "" }}{% endmacro %}{{ f(60) }}',
    'text': '{% set ns = namespace(a="aa") %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}'
    '{% endfor %}',
    'tilde': '{% set ns = namespace(a="aa") %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}'
    '{% endfor %}',
    'texts': '{% set ns = namespace(a=[]) %}{% for i in range(9999) %}{% set ns.a = ns.a + ["a" * '
    '99999] %}{% endfor %}',
    'output': '{% set a = "a" * 9999999 %}{% for i in range(99999) %}{{ a }}{% endfor %}',
    'times': '{{ "a" * 10 ** 10 }}',
    'list times': '{{ [1] * 10 ** 8 }}',
    'times list': '{{ 10 ** 8 * [1] }}',
    'numbers': '{{ 9 ** (9 ** 9) }}',
    'squares': '{% set ns = namespace(a=9) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}'
    '{% endfor %}',
    'nested': '{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}'
    '{% endfor %}{{ ns.a == ns.a }}{{ ns.a }}',
    'nested objects': '{% set ns = namespace(a={}) %}{% for i in range(99) %}{% set ns.a = {"x": '
    'ns.a, "y": ns.a} %}{% endfor %}{{ ns.a | tojson }}',
    'sum': '{{ [[1] * 9999] * 9999 | sum(start=[]) }}',
    'sum of lists': '{{ ([[1] * 99] * 9999) | sum(start=[]) | length }}',
    'center': "{{ 'a' | center(10 ** 9) }}",
    'batch': "{{ [1] | batch(10 ** 9, 'x') | list }}",
    'slice': "{{ [1] | slice(10 ** 9, 'x') | list }}",
    'indent': "{{ ('a\n' * 9999) | indent(99999) }}",
    'width': "{{ 'a'.center(10 ** 9) }}",
    'format': "{{ '{:>1000000000}'.format(1) }}",
    'format of format': "{{ '{:{}}'.format(1, 10 ** 9) }}",
    'percent': "{{ '%1000000000d' % 1 }}",
    'percent filter': "{{ '%1000000000d' | format(1) }}",
    'json': '{{ [1] | tojson(indent=10 ** 9) }}',
    'replace': "{% set a = 'a' * 99999 %}{{ a.replace('a', a) }}",
    'number text': '{{ (1 | string).center(10 ** 9) }}',
    'join': "{% set a = 'a' * 99999 %}{{ a.join([a] * 99999) }}",
    'many widths': "{{ ('{0:9999}' * 199999).format('a') }}",
    'long names': "{{ ('{0' ~ '[0]' * 5000000 ~ '}').format('a') }}",
    'named width': "{{ '%(a)1000000000d' % {'a': 1} }}",
    'many percents': "{{ ('%9999d' * 99999) % ((1,) * 99999) }}",
    'named often': "{{ ('%(a)s' * 99) % {'a': 'a' * 9999999} }}",
    'printed often': "{% set a = 'a' * 9999999 %}{{ '%s%r' % (a, a) }}",
    'digits': '{{ [9 ** 1000] * 999999 }}',
    'parts': "{{ 'a,' * 4000000 }}{{ ('a,' * 4000000).split(',') }}",
    'words': "{{ ('a ' * 4000000).split() }}",
    'lines': "{{ ('\n' * 4000000) | indent }}",
    'replaced': "{{ ('a' * 4000000) | replace('a', 'b') }}",
    'title': "{{ ('a ' * 8000000) | title }}",
    'time': "{{ strftime_now('%99999999d' ~ 'a' * 1000000) }}",
    'slices': '{% set a = "a" * 9999999 %}'
    + ''.join(f'{{% set a{i} = a[1:] %}}' for i in range(40)),
    'separators': "{{ range(99999) | list | tojson(separators=('a' * 9999, 'b')) }}",
    'comparisons': '{% set a = range(99999) | list %}{% set b = range(99999) | list %}'
    + '{{ a == b }}' * 1999,
    'tests': '{% set a = range(99999) | list %}' + '{{ -1 is in a }}' * 1999,
    'recursion': '{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}',
}


@pytest.mark.parametrize('name', BOMBS)
def test_templates_are_bounded(name, monkeypatch):
    monkeypatch.setattr(budget, 'SECONDS', 0.3)
    begin = time.process_time()
    with pytest.raises(UserError) as refused:
        Template(BOMBS[name]).render(SAID)
    assert time.process_time() - begin < 3
    assert str(refused.value).startswith('the chat template ') and '\n' not in str(refused.value)


@pytest.mark.parametrize(
    'name',
    [
        'indent',
        'list times',
        'times list',
        'many widths',
        'named width',
        'many percents',
        'named often',
        'printed often',
        'digits',
        'slices',
        'separators',
    ],
)
def test_memory_of_templates_is_bounded(name, monkeypatch):
    monkeypatch.setattr(budget, 'SECONDS', 0.3)
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            Template(BOMBS[name]).render(SAID)
        assert tracemalloc.get_traced_memory()[1] < 400e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ('source', 'n'),
    [
        ("{% for i in range(1000) %}{{ 'a' * 1000 }}{% endfor %}", 1_000_000),
        ('{{ [2 ** 60] * 100000 }}', 2_100_000),
        ("{{ ('a' * 2000000) | first }}{{ ('a ' * 100000).split() | length }}", 7),
    ],
)
def test_much_is_allowed(source, n):
    assert len(Template(source).render(SAID)) == n


def test_a_template_may_look_at_a_long_chat_many_times():
    long = Conversation([{'role': 'user', 'content': 'a' * 4_000_000}])
    looks = '{{ messages[0].content[1:] | length }}' * 20
    assert Template(looks).render(long) == '3999999' * 20


def test_message_that_is_too_long_is_refused():
    said = [{'role': 'user', 'content': 'a' * ((1 << 24) + 1)}]
    with pytest.raises(UserError, match='the chat holds a text of more than 16777216 characters'):
        Template('{{ messages[0].content }}').render(Conversation(said))

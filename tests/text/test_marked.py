"""Marked strings are strings, and every character keeps its mark.

Here the mark of a character follows from the character, so what any method makes is known.
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.text import marked
from llama_jax.text.budget import TooMuchError
from llama_jax.text.marked import GIVEN, TEMPLATE, UNKNOWN, Marked, text_of, to_json

CHARS = 'abAB <|\n"ßé🙂'
MARKS = {char: TEMPLATE if i % 2 else GIVEN for i, char in enumerate(CHARS)}
texts = st.text(CHARS, max_size=10)
few = st.text('ab <', min_size=1, max_size=2)


def of(text):
    return Marked(text, ''.join(MARKS[char] for char in text))


def check(made, expected):
    """The same texts, each character with its mark."""
    if isinstance(expected, str):
        assert isinstance(made, Marked) and str.__str__(made) == expected
        assert made.marks == ''.join(MARKS[char] for char in expected)
    else:
        assert type(made) is type(expected) and len(made) == len(expected)
        for one, other in zip(made, expected, strict=True):
            check(one, other)


METHODS = {
    'strip': [(), ('ab',)],
    'lstrip': [(), (' a',)],
    'rstrip': [(), ('b ',)],
    'removeprefix': ['few'],
    'removesuffix': ['few'],
    'split': [(), (None, 1), 'few', ('a', 1)],
    'rsplit': [(), (None, 1), 'few', ('a', 1)],
    'splitlines': [(), (True,)],
    'partition': ['few'],
    'rpartition': ['few'],
    'replace': [('', 'a'), ('', 'ab', 2), ('', 'a', 0), ('a', ''), ('a', 'bb', 1), ('ab', '"<')],
}


@pytest.mark.parametrize('name', METHODS)
@given(text=texts, needle=few)
def test_parts_and_replacements(name, text, needle):
    for args in METHODS[name]:
        args = (needle,) if args == 'few' else args
        ours = [of(arg) if isinstance(arg, str) else arg for arg in args]
        check(getattr(of(text), name)(*ours), getattr(text, name)(*args))


@given(texts, texts, st.integers(-3, 3), st.slices(6))
def test_joins_and_slices(one, other, n, part):
    check(of(one) + of(other), one + other)
    check(of(one) * n, one * n)
    check(n * of(one), one * n)
    check(of(one).join([of(other)] * max(n, 0)), one.join([other] * max(n, 0)))
    check(of(one)[part], one[part])
    check(list(of(one)), list(one))
    check(text_of(of(one)), one)
    check(Marked('%s|%s').__mod__((of(one), of(other)))[: len(one)], one)
    assert hash(of(one)) == hash(one) and of(one) == one and {one: 1}[of(one)] == 1
    assert str(of(one)).marks == of(one).marks


@given(texts)
def test_case(text):
    for name in ('upper', 'lower', 'title', 'capitalize', 'swapcase', 'casefold'):
        made = getattr(of(text), name)()
        assert made == getattr(text, name)() and len(made.marks) == len(made)
        for i, char in enumerate(text):
            if text.isascii():
                assert made.marks[i] == MARKS[char]
    assert Marked('aß', 'tg').upper().marks == 'tgg'


@given(texts)
def test_what_is_not_followed_is_unknown(text):
    pads = [(name, (20,)) for name in ('center', 'ljust', 'rjust', 'zfill')]
    for name, args in [*pads, ('expandtabs', ())]:
        made = getattr(of(text), name)(*args)
        assert made == getattr(text, name)(*args) and set(made.marks) <= {UNKNOWN}
    assert set(marked.marks_of(str.__str__(of(text)))) <= {UNKNOWN}
    assert (of('a') + 'x').marks == MARKS['a'] + UNKNOWN
    assert ('x' + of('a')).marks == UNKNOWN + MARKS['a']


@pytest.mark.parametrize(
    ('pattern', 'values'),
    [('%s', 'a'), ('a%%%s', ('b',)), ('%s %s', ('a', 3)), ('%d%s', (1, 'a')), ('%5s', 'a')],
)
def test_percent(pattern, values):
    marked_values = (
        tuple(of(v) if isinstance(v, str) else v for v in values)
        if isinstance(values, tuple)
        else of(values)
    )
    made = Marked(pattern, TEMPLATE) % marked_values
    assert made == pattern % values and len(made.marks) == len(made)
    assert (UNKNOWN in made.marks) == ('d' in pattern or '5' in pattern or '3' in made)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts, inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


def all_marked(value):
    if isinstance(value, str):
        return of(value)
    if isinstance(value, dict):
        return {all_marked(key): all_marked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(all_marked(item) for item in value)
    return value


@given(
    value=values,
    indent=st.none() | st.integers(0, 3) | st.just('\t'),
    separators=st.none() | st.just((',', ':')),
    sort_keys=st.booleans(),
    ensure_ascii=st.booleans(),
)
def test_json(value, **how):
    made = to_json(all_marked(value), **how)
    assert made == json.dumps(value, **how) and len(made.marks) == len(made)
    for char, mark in zip(made, made.marks, strict=True):
        if str.__str__(char) in 'abAB<|':
            # Letters of escapes and of null, true, Infinity count as given.
            assert mark in (MARKS[char], GIVEN)


def test_json_of_strings_and_other_keys():
    made = to_json({Marked('k', TEMPLATE): [Marked('a"\n', 'gtg')]})
    assert made == '{"k": ["a\\"\\n"]}'
    assert made.marks == 'gtttgggggttggggg'
    assert to_json(Marked('é', TEMPLATE)) == '"é"'
    keys = {2: 2, True: 3, None: 4, 0.5: 5}
    assert to_json(keys) == json.dumps(keys)
    for wrong in ({(1,): 2}, [object()], {'a': {1}}):
        with pytest.raises(TypeError):
            to_json(wrong)


def test_lists_belong_to_whoever_wrote_all_of_them():
    first, second = marked.of_message(0), marked.of_message(1)
    a, b, t = Marked('a', first), Marked('b', second), Marked('t', TEMPLATE)
    assert text_of([a, {a: 1}]) == "['a', {'a': 1}]"
    for value, mark in (
        ([a, {a: 1}], first),
        ((a, b), GIVEN),
        ([a, t], UNKNOWN),
        ({t: a}, UNKNOWN),
        ([1, None], GIVEN),
        (3, UNKNOWN),
        ('plain', UNKNOWN),
    ):
        assert set(text_of(value).marks) == {mark}
    assert marked.of_message(10**6) == marked.of_message(10**7)
    assert all(marked.is_message(m) for m in (first, marked.of_message(10**6)))
    assert not any(map(marked.is_message, (TEMPLATE, GIVEN, UNKNOWN)))


LONG = Marked('a', TEMPLATE) * 10_000


@pytest.mark.parametrize(
    'make',
    [
        lambda: LONG * 10_000,
        lambda: LONG.join([LONG] * 10_000),
        lambda: LONG.replace('a', LONG),
        lambda: LONG.replace('', LONG),
        lambda: LONG.center(10**9),
        lambda: LONG.ljust(10**9),
        lambda: LONG.rjust(10**9),
        lambda: LONG.zfill(10**9),
        lambda: Marked('\t').expandtabs(10**9),
        lambda: Marked('%1000000000d') % 1,
        lambda: Marked('%*d') % (10**9, 1),
        lambda: Marked('%.1000000000f') % 1,
        lambda: to_json([1], indent=10**9),
    ],
)
def test_nothing_grows_without_end(make):
    with pytest.raises(TooMuchError):
        make()

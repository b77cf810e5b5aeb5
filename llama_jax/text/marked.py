"""Strings that know who wrote each of their characters: a template, or the messages it is given.

A chat template is trusted to write control tokens and a message is not, yet a template mixes both
at will: it cuts, trims, joins and compares. `Marked` is a `str` and behaves as one; beside each
character it carries a mark, and what is made of marked strings is marked. What is made in a way
that is not followed here is a plain `str`, whose characters count as UNKNOWN.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

from llama_jax.text.budget import ITEMS, TooMuchError, check_items, check_length, sizes_of

TEMPLATE = 't'
ROLE = 'r'
"""The role of a message, one of those that templates know: as good as the template's own."""
UNKNOWN = '?'
GIVEN = 'g'
"""Tools, documents and variables of a request."""
CONTINUED = 'c'
"""The place where a message is to be continued."""
_FIRST_MESSAGE, _MESSAGES = 0x100, 0xD000


def of_message(i: int) -> str:
    """The mark of what message `i` says."""
    return chr(_FIRST_MESSAGE + min(i, _MESSAGES))


def is_message(mark: str) -> bool:
    return ord(mark) >= _FIRST_MESSAGE


class Marked(str):
    """Text and a mark for each of its characters."""

    __slots__ = ('marks',)
    marks: str

    def __new__(cls, text: str = '', marks: str | None = None) -> Marked:
        """`marks`: one for all characters, or one for each; None: those of `text`."""
        check_length(len(text))
        if marks is not None and len(marks) == len(text):
            return _made(text, marks)
        self = super().__new__(cls, str.__str__(text))
        if marks is None:
            self.marks = marks_of(text)
        elif len(marks) == 1:
            self.marks = marks * len(text)
        else:
            raise ValueError(f'{len(marks)} marks for {len(text)} characters')
        return self

    # Concatenation.

    def __str__(self) -> str:
        return self  # so that str(), which Jinja calls everywhere, keeps the marks

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, str) or hasattr(other, '__html__'):
            return NotImplemented
        check_length(len(self) + len(other))
        return _made(str.__add__(self, other), self.marks + marks_of(other))

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        return Marked(other) + self

    def __mul__(self, times: SupportsIndex) -> Marked:
        times = _index(times)
        check_length(len(self) * times)
        return Marked(str.__mul__(self, times), self.marks * times)

    __rmul__ = __mul__

    def join(self, items: Iterable[str]) -> Marked:
        items = list(items)
        texts = [item for item in items if isinstance(item, str)]
        check_length(sum(map(len, texts)) + len(self) * len(items))
        text = str.join(self, items)
        return Marked(text, self.marks.join(map(marks_of, items)))

    def __mod__(self, values: Any) -> Marked:
        _check_fields(self, values)
        fields = list(re.finditer('%[%s]', self))
        given = values if isinstance(values, tuple) else (values,)
        plain = str.__mod__(str.__str__(self), values)
        if self.count('%') != sum(len(field[0].replace('s', '')) for field in fields):
            return Marked(plain, UNKNOWN)
        pieces, start, rest = [], 0, iter(given)
        for field in fields:
            pieces.append(self[start : field.start()])
            pieces.append(self[field.start()] if field[0] == '%%' else text_of(next(rest)))
            start = field.end()
        return Marked(plain, Marked().join([*pieces, self[start:]]).marks)

    # Parts.

    def __getitem__(self, key: Any) -> Marked:
        return _made(str.__getitem__(self, key), self.marks[key])

    def __iter__(self) -> Iterator[str]:
        chars = map(_made, str.__iter__(self), self.marks)
        if len(self) <= ITEMS:
            return chars
        return itertools.chain(itertools.islice(chars, ITEMS), _too_many_parts())

    def lstrip(self, chars: str | None = None, /) -> Marked:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> Marked:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None, /) -> Marked:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> Marked:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> Marked:
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._located(str.split(self, sep, maxsplit), sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._located(str.rsplit(self, sep, maxsplit), sep))

    def _located(self, parts: list[str], sep: str | None) -> Iterator[Marked]:
        check_items(len(parts))
        start = 0
        for part in parts:
            if sep is None:  # any white space stands between, and none at the beginning of a part
                start = self.index(part, start)
            yield self[start : start + len(part)]
            start += len(part) + len(sep or '')

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._cut(str.partition(self, sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._cut(str.rpartition(self, sep))

    def _cut(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(parts[0]), len(parts[0]) + len(parts[1])
        return self[:first], self[first:second], self[second:]

    def splitlines(self, keepends: bool = False) -> list[str]:
        wholes = str.splitlines(self, True)
        check_items(len(wholes))
        lines: list[str] = []
        start = 0
        for line, whole in zip(str.splitlines(self), wholes, strict=True):
            lines.append(self[start : start + len(whole if keepends else line)])
            start += len(whole)
        return lines

    # Other texts.

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Marked:
        most = _index(count)
        n = self.count(old)
        n = n if most < 0 else min(n, most)
        if not n:
            return self
        check_items(n)
        check_length(len(self) + n * (len(new) - len(old)))
        pieces, start, at = [], 0, -1
        for _ in range(n):
            at = self.index(old, start if old else at + 1)
            pieces.append(self.marks[start:at])
            start = at + len(old)
        marks = marks_of(new).join([*pieces, self.marks[start:]])
        return _made(str.replace(self, old, new, most), marks)

    def _recased(self, method: str) -> Marked:
        text = getattr(str, method)(self)
        if len(text) == len(self):  # no character becomes less than one
            return _made(text, self.marks)
        lengths = [len(getattr(str, method)(char)) for char in str.__iter__(self)]
        if sum(lengths) != len(text):  # characters that change with their neighbours
            return Marked(text, UNKNOWN)
        return Marked(text, ''.join(m * n for m, n in zip(self.marks, lengths, strict=True)))

    def upper(self) -> Marked:
        return self._recased('upper')

    def lower(self) -> Marked:
        return self._recased('lower')

    def title(self) -> Marked:
        return self._recased('title')

    def capitalize(self) -> Marked:
        return self._recased('capitalize')

    def swapcase(self) -> Marked:
        return self._recased('swapcase')

    def casefold(self) -> Marked:
        return self._recased('casefold')

    def _padded(self, method: str, width: SupportsIndex, *fill: str) -> Marked:
        check_length(_index(width))
        return Marked(getattr(str, method)(self, width, *fill), UNKNOWN)

    def center(self, width: SupportsIndex, fill: str = ' ', /) -> Marked:
        return self._padded('center', width, fill)

    def ljust(self, width: SupportsIndex, fill: str = ' ', /) -> Marked:
        return self._padded('ljust', width, fill)

    def rjust(self, width: SupportsIndex, fill: str = ' ', /) -> Marked:
        return self._padded('rjust', width, fill)

    def zfill(self, width: SupportsIndex, /) -> Marked:
        return self._padded('zfill', width)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> Marked:
        check_length(len(self) + self.count('\t') * _index(tabsize))
        return Marked(str.expandtabs(self, tabsize), UNKNOWN)


def marks_of(text: str) -> str:
    return text.marks if isinstance(text, Marked) else UNKNOWN * len(text)


def _check_fields(pattern: str, values: Any) -> None:
    """Of a pattern for `%` before it is filled in: widths, and values that are named or printed
    many times."""
    widths = [run for run in re.findall(r'[%)][-+ #0.\d]*', pattern) if len(run) > 1]
    if re.search(r'%[-+ #0.\d]*\*', pattern):
        raise TooMuchError('pads a text to a width that is not written in it')
    numbers = [number for run in widths for number in re.findall(r'[1-9]\d*', run)]
    check_length(sum(int(number[:9]) for number in numbers))
    _, characters = sizes_of(values)
    times = max(1, pattern.count('%(')) if isinstance(values, Mapping) else 1
    check_length(len(pattern) + times * characters)


def _made(text: str, marks: str) -> Marked:
    """With a mark for each character; the quick way."""
    made = str.__new__(Marked, str.__str__(text))
    made.marks = marks
    return made


def _too_many_parts() -> Iterator[str]:
    check_items(ITEMS + 1)
    yield ''


def _index(value: SupportsIndex) -> int:
    return value.__index__()


def text_of(value: Any) -> Marked:
    """`str(value)`, marked: a list or an object that holds nothing but texts of one message is that
    message's."""
    if isinstance(value, Marked):
        return value
    if isinstance(value, list | tuple | dict):
        return Marked(str(value), common_mark(value))
    return Marked(str(value), UNKNOWN)


def common_mark(value: Any) -> str:
    """The mark of all strings within, apart from roles; GIVEN where several messages, or requests,
    wrote them; UNKNOWN where the template is among the writers."""
    marks: set[str] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            marks.update(marks_of(item))
        elif isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            todo += item
    if marks & {TEMPLATE, UNKNOWN}:
        return UNKNOWN
    marks.discard(ROLE)
    return marks.pop() if len(marks) == 1 else GIVEN


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Marked:
    """The text of `json.dumps`, in which each string keeps its marks. Brackets, commas and numbers
    count as GIVEN."""
    if isinstance(indent, int):
        check_length(indent)
        indent = ' ' * indent
    between, colon = separators or (', ' if indent is None else ',', ': ')
    pieces: list[str] = []

    n_characters = 0

    def add(text: Marked) -> None:
        nonlocal n_characters
        n_characters += len(text)
        check_length(n_characters)
        pieces.append(text)

    def punctuation(text: str) -> None:
        add(Marked(text, GIVEN))

    def line(depth: int) -> None:
        if indent is not None:
            punctuation('\n' + indent * depth)

    def write(value: Any, depth: int) -> None:
        if isinstance(value, str):
            add(_json_string(value, ensure_ascii))
        elif isinstance(value, Mapping) and value:
            pairs = sorted(value.items()) if sort_keys else value.items()
            for i, (key, item) in enumerate(pairs):
                punctuation('{' if i == 0 else between)
                line(depth + 1)
                # json.dumps knows how a key that is no string is spelled, and which are refused.
                name = key if isinstance(key, str) else next(iter(json.loads(json.dumps({key: 0}))))
                add(_json_string(name, ensure_ascii))
                punctuation(colon)
                write(item, depth + 1)
            line(depth)
            punctuation('}')
        elif isinstance(value, list | tuple) and value:
            for i, item in enumerate(value):
                punctuation('[' if i == 0 else between)
                line(depth + 1)
                write(item, depth + 1)
            line(depth)
            punctuation(']')
        else:
            punctuation(json.dumps(value))  # which refuses what is no JSON

    write(value, 0)
    return Marked().join(pieces)


def _json_string(text: str, ensure_ascii: bool) -> Marked:
    def quoted(text: str) -> str:
        return json.dumps(str.__str__(text), ensure_ascii=ensure_ascii)

    marks = marks_of(text)
    kinds = set(marks)
    if len(kinds) <= 1:
        return Marked(quoted(text), kinds.pop() if kinds else GIVEN)
    runs = ''.join(
        run[0][0] * (len(quoted(text[slice(*run.span())])) - 2)
        for run in re.finditer(r'(?s)(.)\1*', marks)
    )
    return Marked(quoted(text), f'{GIVEN}{runs}{GIVEN}')

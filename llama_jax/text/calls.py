"""Calls of functions in what a model writes: found in a text as it arrives, piece by piece.

A call is told once the model has closed it: half a call is none, and what is no call stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from llama_jax.text.chat import ChatFormat


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls: JSON objects with `name` and arguments."""

    key: str
    """What the object calls its arguments; either of the usual names is read."""
    opening: str = ''
    """Before the object; empty: it stands in the text as it is."""
    closing: str = ''
    blank: str = ''
    """Between these two and the object."""
    between: str = ''
    """Two calls; empty: the model is asked for one at a time."""
    lead: str = ''
    """A tag that may stand before the object, and tells nothing."""
    array: bool = False
    """The calls are one array."""


LLAMA3 = CallFormat('parameters', lead='<|python_tag|>')
"""Llama 3.1 to 3.3 (the card's "JSON based tool calling"), whose templates take one call a turn."""
HERMES = CallFormat('arguments', '<tool_call>', '</tool_call>', blank='\n', between='\n')
"""Hermes, Qwen 2.5 and 3, SmolLM3."""
FALCON3 = CallFormat('arguments', '<tool_call>', '</tool_call>', blank='\n', array=True)
MISTRAL = CallFormat('arguments', '[TOOL_CALLS]', array=True)
"""Mistral's up to version 7 of its tokenizer; later ones write no JSON object."""


def call_format(chat: ChatFormat) -> CallFormat | None:
    """What the model's chat format tells it to write; None: nothing that is known here."""
    if chat.knows('<tool_call>'):
        if chat.knows('<function='):  # Qwen3-Coder: tags instead of JSON
            return None
        # Templates are source code, in which a line may end as such or by its escape.
        return FALCON3 if any(map(chat.knows, ('<tool_call>\n[', '<tool_call>\\n['))) else HERMES
    if chat.knows('[TOOL_CALLS]'):
        return None if chat.knows('[ARGS]') else MISTRAL
    if chat.knows('"parameters": ') and chat.knows('ipython'):
        return LLAMA3
    return None


class Call(NamedTuple):
    name: str
    arguments: str
    """The JSON of an object."""


_AGAIN, _ANYWAY = 8, 100_000
"""Characters that may be read in vain, in objects that turn out to be no calls: so many times those
of the text, and so many more. Objects within objects would be read once for each."""


class CallParser:
    """Splits a text into calls and what is none.

    A call names one of `names`, in an object that is whole, between the tags of `format` where it
    has any; within `<think>` there are none. White space around calls is dropped where no other
    text goes on behind it. Time is linear in the length.
    """

    def __init__(
        self,
        format_: CallFormat,
        names: Collection[str],
        *,
        most: int | None = None,
        thinking: bool = False,
    ) -> None:
        """`most`: behind so many calls nothing is told any more. `thinking`: the text begins within
        the thoughts of the model."""
        self._format, self._names, self._most = format_, frozenset(names), most
        self._held = ''
        """What may become a call, or a tag."""
        self._thinking = thinking
        self._gap = ''
        """White space, and what stands between two calls, until it is known what follows."""
        self._object: _Object | None = None
        """The object at the beginning of what is held."""
        self._given = self._in_vain = 0
        """Characters: of the text so far, and of objects that were no calls."""
        self._n_calls, self._said, self._behind_call = 0, False, False

    def __call__(self, text: str) -> list[str | Call]:
        """What is sure after `text` more: texts and calls, in order."""
        self._given += len(text)
        self._held += text
        return list(self._parts(ended=False))

    def finish(self) -> list[str | Call]:
        """The rest, after the last text."""
        parts = list(self._parts(ended=True))
        if self._gap and not self._n_calls:
            parts.append(self._gap)
        return parts

    def _parts(self, *, ended: bool) -> Iterator[str | Call]:
        while self._held and self._n_calls != self._most:
            if self._in_vain > _AGAIN * self._given + _ANYWAY:
                yield from self._text(len(self._held))
                return
            if self._object is None:
                yield from self._seek(ended)
                if self._object is None:
                    return
            calls = self._object.read(self._held, ended=ended)
            if calls is None:
                return
            if not self._names.issuperset(call.name for call in calls):
                calls = []
            if calls:
                self._held = self._held[self._object.stop :]
                calls = calls[: self._most]
                self._n_calls += len(calls)
                self._behind_call = True
                self._gap = re.sub('[;,]', '', self._gap)
                yield from calls
            else:
                self._in_vain += self._object.n_read
                yield from self._text(max(1, len(self._format.opening)))
            self._object = None

    def _seek(self, ended: bool) -> Iterator[str]:
        """To the next place where a call may begin."""
        opening = self._format.opening or '{'
        while self._held:
            begins = (opening, self._format.lead) if self._format.lead else (opening,)
            tags = ('</think>',) if self._thinking else (*begins, '<think>')
            places = {tag: self._held.find(tag) for tag in tags}
            tag = min((tag for tag in tags if places[tag] >= 0), key=places.__getitem__, default='')
            if not tag:
                n_begun = 0 if ended else max(_begun(self._held, tag) for tag in tags)
                yield from self._text(len(self._held) - n_begun)
                return
            if tag in begins:
                yield from self._text(places[tag])
                self._object = _Object(self._format)
                return
            yield from self._text(places[tag] + len(tag))
            self._thinking = not self._thinking

    def _text(self, n: int) -> Iterator[str]:
        """The first `n` characters of what is held are no call."""
        text, self._held = self._held[:n], self._held[n:]
        if self._behind_call and not text.strip(' \t\r\n;,'):
            self._gap += text
            return
        text = self._gap + text
        if self._n_calls and not self._said:
            text = text.lstrip()
        shown = text.rstrip()
        self._gap = text[len(shown) :]
        if shown:
            self._said, self._behind_call = True, False
            yield shown


class _Object:
    """The call, or the array of calls, with which a text begins."""

    _MARKS = re.compile(r'["{}\[\]]')
    _STRING_MARKS = re.compile(r'["\\]')
    _KEYS = tuple(
        f'"{key}"' for key in ('name', 'arguments', 'parameters', 'type', 'function', 'id')
    )

    def __init__(self, format_: CallFormat) -> None:
        self._format = format_
        self._start = self._place = -1
        self._depth, self._in_string, self._whole = 0, False, False
        self.stop = -1
        """Behind it and its closing tag."""

    @property
    def n_read(self) -> int:
        """Characters that were looked at."""
        return self._place - self._start

    def read(self, text: str, *, ended: bool) -> list[Call] | None:
        """Its calls: none where it is no call; None: more of the text has to be seen."""
        if self._start < 0:
            lead, opening = self._format.lead, self._format.opening
            start = len(lead if lead and text.startswith(lead) else opening)
            start += len(text[start:]) - len(text[start:].lstrip())
            if start == len(text):
                return [] if ended else None
            if text[start] not in ('{[' if self._format.opening else '{'):
                return []
            self._start = self._place = start
        if not self._format.opening and not self._may_be_call(text):
            return []
        self._whole = self._whole or self._scan(text)
        if not self._whole:
            return [] if ended else None
        behind = text[self._place :].lstrip()
        closing = self._format.closing
        if not behind.startswith(closing):
            if not closing.startswith(behind):
                return []
            if not ended:
                return None
            closing = behind  # it ends here, and the object is whole
        self.stop = len(text) - len(behind) + len(closing) if closing else self._place
        return _calls(text[self._start : self._place])

    def _may_be_call(self, text: str) -> bool:
        """Text that is not between tags is held back only where it begins like a call."""
        begun = text[self._start + 1 : self._start + 64].lstrip()
        return any(begun.startswith(key) or key.startswith(begun) for key in self._KEYS)

    def _scan(self, text: str) -> bool:
        """Whether the brackets are closed; looks at each character once."""
        while self._place < len(text):
            marks = self._STRING_MARKS if self._in_string else self._MARKS
            found = marks.search(text, self._place)
            if found is None:
                self._place = len(text)
                return False
            mark = found[0]
            if mark == '\\':
                if found.end() == len(text):
                    self._place = found.start()
                    return False
                self._place = found.end() + 1
                continue
            self._place = found.end()
            if mark == '"':
                self._in_string = not self._in_string
                continue
            self._depth += 1 if mark in '{[' else -1
            if not self._depth:
                return True
        return False


def _calls(text: str) -> list[Call]:
    """Of an object, or of an array of them; none where one of them is no call."""
    try:
        # Models write line breaks within strings; what is told is JSON again.
        value = json.loads(text, strict=False, parse_constant=_refuse)
        objects = value if isinstance(value, list) else [value]
        calls = [_call(one) for one in objects]
    except (ValueError, RecursionError):
        return []
    return [call for call in calls if call] if all(calls) else []


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get('name'), str):
        return None
    key = next((key for key in ('arguments', 'parameters') if key in value), None)
    if key is None:
        return None
    arguments = value[key]
    if isinstance(arguments, str):  # JSON within JSON
        arguments = json.loads(arguments, strict=False, parse_constant=_refuse)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return Call(value['name'], json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _refuse(name: str) -> NoReturn:
    raise ValueError(f'{name} is no JSON')


def _begun(text: str, tag: str) -> int:
    """Characters at the end of `text` with which `tag` begins."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if tag.startswith(text[-n:])), 0)

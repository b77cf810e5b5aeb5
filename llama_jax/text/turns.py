"""Which tokens of a chat belong to the turn of which message: what instruction tuning learns.

A turn is what the model has to write itself when it is asked: all that comes after the prompt, up
to the token that ends generation. Marks for it (`{% generation %}`) stand in hardly any template,
and to render a chat message by message goes wrong where a template changes earlier turns when later
ones come. Here every character knows who wrote it (text/marked.py), so a turn is found in the one
text that is learnt.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.marked import GIVEN, ROLE, TEMPLATE, UNKNOWN, Marked, is_message, of_message
from llama_jax.text.vocabulary import Piece, Vocabulary, encode_each

VERSION = 1
"""Of which tokens are in a turn: what is kept on disk is of one."""
NOBODY = -1
"""In place of a message, for what is in no turn."""


class Turns(NamedTuple):
    """A chat as tokens."""

    ids: np.ndarray
    """Int32 [n]."""
    message: np.ndarray
    """Int32 [n], the index of the message in whose turn a token is; NOBODY for others."""


Parts = Sequence[Marked | int]
"""Texts, and the ids of control tokens between them."""


def control_parts(text: Marked, control: Mapping[str, int]) -> tuple[list[Marked | int], list[int]]:
    """Pieces of a text that a template wrote, and the ids of the control tokens between them; and
    the characters of each.

    A name is a token where the template wrote all of it, and text where a message wrote a part.
    Raises UserError where that cannot be told.
    """
    pattern = _any_of(tuple(control))
    if pattern is None:
        return ([text], [len(text)]) if text else ([], [])

    def found(runs: str) -> list[tuple[int, int]]:
        plain = str.__str__(text)
        return [
            match.span()
            for run in re.finditer(runs, text.marks)
            for match in pattern.finditer(plain, *run.span())
        ]

    own = TEMPLATE + ROLE
    spans = found(f'[{own}]+')
    if UNKNOWN in text.marks:
        other = set(found(f'[{own}{re.escape(UNKNOWN)}]+')) ^ set(spans)
        if other:
            start, end = min(other)
            raise UserError(
                f'the chat template makes {str.__str__(text[start:end])} in a way that leaves open '
                'who wrote it, the template or a message: take it out of the messages'
            )
    parts: list[Marked | int] = []
    widths: list[int] = []
    at = 0
    for start, end in [*spans, (len(text), len(text))]:
        if start > at:
            parts.append(text[at:start])
            widths.append(start - at)
        if end > start:
            parts.append(control[str.__str__(text[start:end])])
            widths.append(end - start)
        at = end
    return parts, widths


@functools.lru_cache(maxsize=8)  # thousands of chats are of one vocabulary
def _any_of(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Any of the names, the longest first; None where there is none."""
    longest = sorted(filter(None, names), key=len, reverse=True)
    return re.compile('|'.join(map(re.escape, longest))) if longest else None


def turns_of(
    parts: Parts,
    vocabulary: Vocabulary,
    *,
    starts: Mapping[int, int | None],
    ends: Collection[int],
    last: int,
    widths: Sequence[int] | None = None,
) -> Turns:
    """The tokens of a chat, and the turns of the messages in `starts`.

    Args:
      starts: message to the character at which its turn begins; None: at its first own.
      ends: control tokens that end an answer. A turn goes on to the first of them behind the
        message, the header of the next message included (GLM ends an answer by `<|user|>`); where
        there is none it ends with the message.
      last: the index of the last message. Where nothing ends its turn, eos follows: a model that
        never learns to end goes on for ever.
      widths: characters that each part counts for; default: a control token is one.

    A token of which any character is in a turn is in it. Raises UserError where the text has
    nothing of a message in `starts`.
    """
    if widths is None:
        widths = [1 if isinstance(part, int) else len(part) for part in parts]
    marks = ''.join(
        TEMPLATE * width if isinstance(part, int) else part.marks
        for part, width in zip(parts, widths, strict=True)
    )
    begins = np.concatenate([[0], np.cumsum(widths)]).astype(int).tolist()
    closers = {
        begins[k]: begins[k + 1]
        for k, part in enumerate(parts)
        if isinstance(part, int) and part in ends
    }
    owner_C = np.full(len(marks), NOBODY, np.int32)
    unclosed = False
    for i, start in sorted(starts.items()):
        first, stop = written(marks, i)
        stop, closed = _closed(marks, first, stop, closers)
        unclosed = i == last and not closed
        if unclosed and not _visible(parts, begins, stop):
            stop = len(marks)
        owner_C[first if start is None else start : stop] = i

    ids: list[int] = []
    owners = [np.zeros(0, np.int32)]
    for k, piece in encode_each(vocabulary, parts):
        here = owner_C[begins[k] : begins[k + 1]]
        if not piece.text:
            owners.append(here.max(keepdims=True))
        else:
            here = here[piece.left : piece.left + len(piece.text)]
            owners.append(_owners(vocabulary, piece, here))
        ids += piece.ids
    if unclosed:
        ids.append(vocabulary.eos_id)
        owners.append(np.array([last]))
    return Turns(np.array(ids, np.int32), np.concatenate(owners).astype(np.int32))


def written(marks: str, i: int) -> tuple[int, int]:
    """Where the words of message `i` begin and end. Raises UserError where there are none, or those
    of another message are among them."""
    mark = of_message(i)
    if mark not in marks:
        raise UserError(
            f'the chat has nothing of message {i}, which is to be learnt: it is empty, or the chat '
            'template leaves it out; give it weight 0, or take it out'
        )
    start, stop = marks.index(mark), marks.rindex(mark) + 1
    if any(is_message(other) and other != mark for other in set(marks[start:stop])):
        raise UserError(f'the chat template writes other messages within message {i}')
    return start, stop


def check_whole(text: Marked, i: int, said: str) -> None:
    """Raise UserError unless all that message `i` says, `said`, is in the text: what is learnt has
    to be what the data says."""
    start, stop = written(text.marks, i)
    own = of_message(i) + UNKNOWN
    seen = ''.join(
        char
        for char, mark in zip(str.__str__(text[start:stop]), text.marks[start:stop], strict=True)
        if mark in own
    )
    if len(_letters(seen)) < len(_letters(said)):
        raise UserError(
            f'the chat template leaves out a part of message {i}, such as its reasoning: it cannot '
            'be learnt; give the message weight 0, or leave that part out'
        )


def alike(a: str, b: str) -> int:
    """Characters of `b` that are as `a` begins, but for white space within: templates often have
    more of it in one place than in another. Where both go on differently, a word or a tag that they
    begin alike is not counted (`<think>`, `<tool_call>`)."""
    i = j = same = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            i, j = i + 1, j + 1
            same = j
        elif a[i].isspace():
            i += 1
        elif b[j].isspace():
            j += 1
        else:
            while same and not (b[same - 1].isspace() or b[same - 1] in '>]'):
                same -= 1
            break
    return same


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Ids with which both begin."""
    n = min(len(a), len(b))
    return next((k for k in range(n) if a[k] != b[k]), n)


def _letters(text: str) -> str:
    """Without white space and the tags of thoughts, which templates take off and write again."""
    return re.sub(r'\s|</?think>', '', text)


def _closed(marks: str, first: int, stop: int, closers: Mapping[int, int]) -> tuple[int, bool]:
    """Where the turn ends of a message with words from `first` to `stop`, and whether a token ends
    it. Several in a row all do (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`)."""
    while stop < len(marks) and marks[stop] == GIVEN:  # the closing brackets of its JSON
        stop += 1
    following = next((k for k in range(stop, len(marks)) if is_message(marks[k])), len(marks))
    # Also among its words: behind the end, templates name what the assistant called.
    closer = next((begin for begin in sorted(closers) if first <= begin < following), None)
    if closer is None:
        return stop, False
    while closer in closers:
        closer = closers[closer]
    return closer, True


def _visible(parts: Parts, begins: Sequence[int], stop: int) -> bool:
    """Whether anything but white space stands behind the character `stop`."""
    return any(
        isinstance(part, int) or part[max(stop - begin, 0) :].strip()
        for part, begin in zip(parts, begins, strict=False)
        if begin >= stop or not isinstance(part, int)
    )


def _owners(vocabulary: Vocabulary, piece: Piece, owner_C: np.ndarray) -> np.ndarray:
    """The owner of each token of a text, given those of its characters."""
    text, ids = piece.text, piece.ids
    if (owner_C == owner_C[0]).all():
        return np.full(len(ids), owner_C[0])
    known = {i: len(vocabulary.token_bytes(i)) for i in {*ids}}
    sizes = np.array([known[i] for i in ids])
    codes = np.frombuffer(text.encode('utf-32-le'), '<u4')
    widths = 1 + (codes > 0x7F).astype(int) + (codes > 0x7FF) + (codes > 0xFFFF)
    extra = int(sizes.sum() - widths.sum())
    if extra in (0, int(vocabulary.dummy_prefix)) and sizes.all():
        owner_U = np.concatenate([np.full(extra, NOBODY), np.repeat(owner_C, widths)])
        return np.maximum.reduceat(owner_U, np.cumsum(sizes) - sizes)
    # A vocabulary that changes its text: a border is where the text up to it has other tokens.
    owners = np.full(len(ids), owner_C[0])
    for border in (np.flatnonzero(np.diff(owner_C)) + 1).tolist():
        before = vocabulary.encode(text[:border], continues=piece.continues).tolist()
        at = _common(before, ids)
        # A token across the border is in the turn, at either end of it.
        at += owner_C[border] == NOBODY and at < len(before)
        owners[at:] = owner_C[border]
    return owners

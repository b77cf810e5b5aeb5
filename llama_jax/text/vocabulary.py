"""Text to token ids and back: what generation needs of a vocabulary."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from llama_jax.errors import UserError

TURNS = frozenset(
    {
        *('<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
        *('<|header_start|>', '<|header_end|>', '<|eot|>', '<|end|>', '<|system|>', '<|user|>'),
        *('<|assistant|>', '<start_of_turn>', '<end_of_turn>'),
    }
)
"""Tokens around the turns of chats. They are control tokens also where a model's files forgot to
say so (OpenHermes's `<|im_start|>`), or a message that spells them could speak for another."""
_SURROGATE = re.compile('[\ud800-\udfff]')


class Vocabulary(Protocol):
    """Text to token ids and back; control tokens have ids that no text can spell."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""

    @property
    def control(self) -> Mapping[str, int]:
        """Name to id of the control tokens."""

    @property
    def dummy_prefix(self) -> bool:
        """A space is put before every text, and `decode` takes it away."""

    @property
    def space_after_control(self) -> bool:
        """Whether that space is put before a text behind a control token as well."""

    @property
    def takes_space(self) -> Mapping[int, tuple[bool, bool]]:
        """Control tokens that take white space from the text on their left, or right."""

    def encode(self, text: str, *, continues: bool = False, most: int | None = None) -> np.ndarray:
        """Int32 [n], without bos, eos or any control token, whatever the text spells.

        `continues`: the text goes on from another, so no space is put before it. Raises
        TooLongError for more than `most` ids, and does not read a long text to its end for that.
        """

    def decode(self, ids: Iterable[int] | np.ndarray, *, show_control: bool = False) -> str:
        """Text of `ids`, with U+FFFD for bytes that are no UTF-8. Control tokens are dropped, or
        spelled by name when `show_control`."""

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 that a token stands for, perhaps a part of a character; b'' if none."""


class TooLongError(UserError):
    """A text has more tokens than there is room for."""

    @classmethod
    def of(cls, most: int) -> TooLongError:
        """For a text of more than `most` tokens."""
        return cls(f'the text has more than {most} tokens: shorten it')


def refuse_surrogates(text: str) -> None:
    """Raise UserError for text that holds half a character, which no UTF-8 can."""
    found = _SURROGATE.search(text)
    if found:
        raise UserError(
            f'the text holds the lone surrogate U+{ord(found[0]):04X} at character '
            f"{found.start()}: drop it with text.encode('utf-8', 'ignore').decode()"
        )


def within(vocabulary: Vocabulary, most: int) -> Vocabulary:
    """The same one for a single prompt: it raises TooLongError when the texts that it encodes have
    more than `most` ids in all."""
    return cast(Vocabulary, _Within(vocabulary, most))


class _Within:
    def __init__(self, vocabulary: Vocabulary, most: int) -> None:
        self._vocabulary, self._left = vocabulary, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vocabulary, name)

    def encode(self, text: str, *, continues: bool = False) -> np.ndarray:
        ids = self._vocabulary.encode(text, continues=continues, most=self._left)
        self._left -= len(ids)
        return ids


class Piece(NamedTuple):
    """What became of a part of a text: a control token, or a text between two of them."""

    ids: list[int]
    text: str = ''
    """Of which the ids were made; empty for a control token."""
    left: int = 0
    """Characters that a token took from the left of it."""
    continues: bool = False
    """As it was encoded."""


def encode_each(vocabulary: Vocabulary, parts: Iterable[str | int]) -> Iterator[tuple[int, Piece]]:
    """The parts that became tokens, each with its index: texts with the ids of control tokens
    between them, as the model's own tokenizer gives them for the whole. Each text is encoded as
    one, with the space that is put before a text where it is put before each, and without white
    space that a token takes from beside it."""
    parts = list(parts)
    takes = vocabulary.takes_space
    any_before = False
    for i, part in enumerate(parts):
        if isinstance(part, int):
            yield i, Piece([part])
            any_before = True
            continue
        text = str.__str__(part)  # of text that knows more, the text alone
        before, after = (parts[j] if 0 <= j < len(parts) else None for j in (i - 1, i + 1))
        if isinstance(before, int) and takes.get(before, (False, False))[1]:
            text = text.lstrip()
        left = len(part) - len(text)
        if isinstance(after, int) and takes.get(after, (False, False))[0]:
            text = text.rstrip()
        if text:
            continues = any_before and not vocabulary.space_after_control
            ids = vocabulary.encode(text, continues=continues).tolist()
            yield i, Piece(ids, text, left, continues)
            any_before |= bool(ids)


def encode_parts(vocabulary: Vocabulary, parts: Iterable[str | int]) -> list[int]:
    """Token ids of all parts, see `encode_each`."""
    return [i for _, piece in encode_each(vocabulary, parts) for i in piece.ids]


def encode_spelled(vocabulary: Vocabulary, text: str, *, continues: bool = False) -> list[int]:
    """Token ids of a text in which control tokens go by name, as the tokenizers of transformers
    read it; `continues` as of `Vocabulary.encode`."""
    control = vocabulary.control
    parts = _any_of(frozenset(control)).split(text) if control else [text]
    if len(parts) == 1:
        return vocabulary.encode(text, continues=continues).tolist()
    return encode_parts(vocabulary, [control.get(part, part) for part in parts if part])


@functools.lru_cache(16)
def _any_of(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')')

"""Tokens to text: what generation needs of a vocabulary, and the text of a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

_BROKEN = '\N{REPLACEMENT CHARACTER}'


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

    def encode(self, text: str, *, continues: bool = False) -> np.ndarray:
        """Int32 [n], without bos, eos or any control token, whatever the text spells.

        `continues`: the text goes on from another, so no space is put before it.
        """

    def decode(self, ids: Iterable[int] | np.ndarray, *, show_control: bool = False) -> str:
        """Text of `ids`, with U+FFFD for bytes that are no UTF-8. Control tokens are dropped, or
        spelled by name when `show_control`."""

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 that a token stands for, perhaps a part of a character; b'' if none."""


class Detokenizer:
    """Turns tokens into text as they arrive, and never breaks a character.

    A character's UTF-8 bytes may lie in several tokens: what ends in the midst of one is held back
    until the rest is there (or `finish` says that there is none). All pieces joined are the text of
    all tokens. Only a few tokens are decoded at a time, so long streams stay fast.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, prompt: Sequence[int] = ()):
        """`decode` gives the text of token ids, with U+FFFD for bytes that are no character. Text
        continues that of `prompt`: tokenizers which drop the space before the first word keep it.
        """
        self._decode = decode
        self._ids = list(prompt)
        self._start = 0  # the window that is decoded: text before it is out, and is not looked at
        self._shown = len(self._ids)  # tokens whose text is out

    def __call__(self, tokens: Iterable[int]) -> str:
        """The text that `tokens` complete; may be empty."""
        self._ids.extend(tokens)
        text = self._text()
        return '' if text.endswith(_BROKEN) else self._show(text)

    def finish(self) -> str:
        """What was held back."""
        return self._show(self._text())

    def _text(self) -> str:
        known = self._decode(self._ids[self._start : self._shown]).rstrip(_BROKEN)
        return self._decode(self._ids[self._start :])[len(known) :]

    def _show(self, text: str) -> str:
        # The window keeps the tokens of the last text, without which a tokenizer might take the
        # next word for the first one.
        if text:
            self._start = self._shown
        self._shown = len(self._ids)
        return text

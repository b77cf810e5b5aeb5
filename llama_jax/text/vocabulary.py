"""Text to token ids and back: what generation needs of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np


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

    def encode(self, text: str, *, continues: bool = False) -> np.ndarray:
        """Int32 [n], without bos, eos or any control token, whatever the text spells.

        `continues`: the text goes on from another, so no space is put before it.
        """

    def decode(self, ids: Iterable[int] | np.ndarray, *, show_control: bool = False) -> str:
        """Text of `ids`, with U+FFFD for bytes that are no UTF-8. Control tokens are dropped, or
        spelled by name when `show_control`."""

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 that a token stands for, perhaps a part of a character; b'' if none."""


def encode_parts(vocabulary: Vocabulary, parts: Iterable[str | int]) -> list[int]:
    """Token ids of texts with the ids of control tokens between them. Each text is one: it is not
    cut further, and it is encoded as the text between two control tokens is."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids.extend(vocabulary.encode(part).tolist())
    return ids

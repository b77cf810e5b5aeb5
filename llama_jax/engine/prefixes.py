"""Prompts that slots of the KV cache still hold: what begins alike is not read again."""

from __future__ import annotations

from collections.abc import Sequence


class Prefixes:
    """Which prompt each row of the cache holds, whole pieces only.

    A prompt that begins as another does need not be read from its beginning. Only whole pieces
    that were read as pieces count: a row's keys and values are then the very same, to the last bit,
    as if it had read them itself. Only prompts of one owner share: how soon an answer comes, and
    how many of its tokens were there, would tell what others ask (Song et al. 2024,
    arXiv:2409.20002).
    """

    def __init__(self, rows: int, piece: int) -> None:
        self._held: list[tuple[int, ...]] = [()] * rows
        self._owner = [''] * rows
        self._used = [0] * rows
        self._clock = 0
        self._piece = piece

    def hold(self, row: int, tokens: Sequence[int], owner: str | None = None) -> None:
        """The row holds these tokens from its beginning on, and nothing else of use. They are of
        this `owner`; None: of the same as before."""
        if owner is not None:
            self._owner[row] = owner
        self._held[row] = tuple(tokens[: len(tokens) // self._piece * self._piece])
        self._clock += 1
        self._used[row] = self._clock

    def find(self, prompt: Sequence[int], free: Sequence[int], owner: str) -> tuple[int, int, int]:
        """For a new prompt of `owner`: a free row for it, the row that holds most of its beginning,
        and how many tokens of it. Of the free rows, that one, or the one used longest ago."""
        shared = [
            self._shared(held, prompt) if whose == owner else 0
            for held, whose in zip(self._held, self._owner, strict=True)
        ]
        source = max(range(len(shared)), key=lambda row: (shared[row], row in free))
        if shared[source] and source in free:
            return source, source, shared[source]
        empty_first = min(free, key=lambda row: (bool(self._held[row]), self._used[row]))
        return empty_first, source, shared[source]

    def _shared(self, held: tuple[int, ...], prompt: Sequence[int]) -> int:
        """Whole pieces at the beginning of both; never all of a prompt, whose last token is read to
        know what follows it."""
        piece, n = self._piece, 0
        while n + piece <= min(len(held), len(prompt) - 1) and held[n : n + piece] == tuple(
            prompt[n : n + piece]
        ):
            n += piece
        return n

"""Prompts that slots of the KV cache still hold: what begins alike is not read again."""

from __future__ import annotations

from collections.abc import Sequence


class Prefixes:
    """Which prompt each row of the cache holds, whole pieces only.

    A prompt that begins as another does need not be read from its beginning. Only whole pieces
    that were read as pieces count: a row's keys and values are then the very same, to the last bit,
    as if it had read them itself.
    """

    def __init__(self, rows: int, piece: int) -> None:
        self._held: list[tuple[int, ...]] = [()] * rows
        self._used = [0] * rows
        self._clock = 0
        self._piece = piece

    def hold(self, row: int, tokens: Sequence[int]) -> None:
        """The row holds these tokens from its beginning on, and nothing else of use."""
        self._held[row] = tuple(tokens[: len(tokens) // self._piece * self._piece])
        self._clock += 1
        self._used[row] = self._clock

    def find(self, prompt: Sequence[int], free: Sequence[int]) -> tuple[int, int, int]:
        """For a new prompt: a free row for it, the row that holds most of its beginning, and how
        many tokens of it. Of the free rows, that one, or the one used longest ago."""
        shared = [self._shared(held, prompt) for held in self._held]
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

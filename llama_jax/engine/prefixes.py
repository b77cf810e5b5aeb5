"""Prompts that slots of the KV cache still hold: what begins alike is not read again."""

from __future__ import annotations

from collections.abc import Sequence


class Prefixes:
    """Which prompt each slot of the cache holds, whole pieces only.

    A prompt that begins as another does need not be read from its beginning. Only whole pieces
    that were read as pieces count: the keys and values of a slot are then the very same, to the
    last bit, as if it had read them itself. Only prompts of one owner share: how soon an answer
    comes, and how many of its tokens were there, would tell what others ask (Song et al. 2024,
    arXiv:2409.20002).
    """

    def __init__(self, slots: int, piece: int) -> None:
        self._held: list[tuple[int, ...]] = [()] * slots
        self._owner = [''] * slots
        self._used = [0] * slots
        self._clock = 0
        self._piece = piece

    def hold(self, slot: int, tokens: Sequence[int], owner: str | None = None) -> None:
        """The slot holds these tokens from its beginning on, and nothing else of use. They are of
        this `owner`; None: of the same as before."""
        if owner is not None:
            self._owner[slot] = owner
        self._held[slot] = tuple(tokens[: len(tokens) // self._piece * self._piece])
        self._clock += 1
        self._used[slot] = self._clock

    def place(self, prompt: Sequence[int], free: Sequence[int], owner: str) -> tuple[int, int]:
        """For a new prompt of `owner`: a free slot, and how many tokens of its beginning that
        holds. It is the one that holds the most, where none of those in use holds more; else an
        empty one, or the one used longest ago."""
        source, n = self.longest(prompt, owner, free)
        if n and source in free:
            return source, n
        return min(free, key=lambda slot: (bool(self._held[slot]), self._used[slot])), 0

    def longest(
        self, prompt: Sequence[int], owner: str, better: Sequence[int] = ()
    ) -> tuple[int, int]:
        """The slot that holds most of the beginning of a prompt of `owner`, one of the `better` if
        it can be, and how many tokens of it."""
        shared = [
            self._shared(held, prompt) if whose == owner else 0
            for held, whose in zip(self._held, self._owner, strict=True)
        ]
        source = max(range(len(shared)), key=lambda slot: (shared[slot], slot in better))
        return source, shared[source]

    def _shared(self, held: tuple[int, ...], prompt: Sequence[int]) -> int:
        """Whole pieces at the beginning of both; never all of a prompt, whose last token is read to
        know what follows it."""
        piece, n = self._piece, 0
        while n + piece <= min(len(held), len(prompt) - 1) and held[n : n + piece] == tuple(
            prompt[n : n + piece]
        ):
            n += piece
        return n

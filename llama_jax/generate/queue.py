"""Requests on their way: those that wait, by turns of their owners, and what rows remember."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar


class Owned(Protocol):
    """What can wait."""

    @property
    def owner(self) -> str:
        """Whose it is."""


T = TypeVar('T', bound=Owned)


def open_to_one(most: int) -> int:
    """Places of a queue of `most` that one owner may fill, at least."""
    return -(-most * 3 // 4)


class FairQueue(Generic[T]):
    """First in, first out for each owner; owners take turns, so that one with many requests does
    not hold up the others."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[T]:
        for waiting in self._of.values():
            yield from waiting

    def has_room(self, owner: str, most: int) -> bool:
        """For one more, of `most` in all: the last quarter is for owners with less than a quarter
        of them, so that one with many does not shut the others out."""
        n, own = len(self), len(self._of.get(owner, ()))
        return n < most and (n < open_to_one(most) or own < most / 4)

    def append(self, item: T) -> None:
        """Last of its owner's."""
        self._of.setdefault(item.owner, deque()).append(item)

    def pop(self) -> T:
        """The first of the owner whose turn it is; then it is the turn of the others."""
        owner, waiting = next(iter(self._of.items()))
        item = waiting.popleft()
        if waiting:
            self._of.move_to_end(owner)
        else:
            del self._of[owner]
        return item

    def remove(self, condition: Callable[[T], bool]) -> list[T]:
        """Take out all that meet a condition."""
        gone = [item for item in self if condition(item)]
        if gone:
            kept = [item for item in self if item not in gone]
            self._of.clear()
            for item in kept:
                self.append(item)
        return gone


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

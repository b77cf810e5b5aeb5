"""Requests that wait, by turns of their owners."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
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

"""How much time and memory a chat template may take: limits, and what is left of one rendering."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

LONGEST = 1 << 24
"""Characters of one string."""
ITEMS = 1 << 20
"""Of one list or object, with all that is within; parts that a string is cut into."""
SECONDS = 2.0
"""Of processor time for one rendering; real templates take milliseconds."""
CHARACTERS = 4 * LONGEST
"""Of all strings made in one rendering."""
_BITS = 4096
"""Of a number that is multiplied."""


class TooMuchError(Exception):
    """A template makes more than it may."""


@dataclass
class Budget:
    """What is left of one rendering."""

    until: float
    characters: int

    @classmethod
    def of(cls, characters: int) -> Budget:
        """One that begins now."""
        return cls(time.thread_time() + SECONDS, characters)

    def tick(self) -> None:
        if time.thread_time() > self.until:
            raise TooMuchError(f'takes more than {SECONDS:g} s')

    def charge(self, value: Any) -> Any:
        """Count what was made; returns it."""
        if isinstance(value, str):
            check_length(len(value))
            self.characters -= len(value)
        elif isinstance(value, list | tuple | dict):
            self.characters -= sizes_of(value)[0]
        if self.characters < 0:
            raise TooMuchError(f'makes more than {CHARACTERS} characters')
        return value


CURRENT: ContextVar[Budget] = ContextVar('CURRENT')


def tick() -> Budget:
    budget = CURRENT.get()
    budget.tick()
    return budget


def check_length(n: int) -> None:
    if n > LONGEST:
        raise TooMuchError(f'makes a text of more than {LONGEST} characters')


def check_items(n: int) -> None:
    if n > ITEMS:
        raise TooMuchError(f'makes a list of more than {ITEMS} items')


def sizes_of(value: Any) -> tuple[int, int]:
    """Items of a value with all that is within, and their characters, as often as they are there:
    printing and comparing go through all of it. Raises TooMuchError."""
    todo, n, characters = [value], 0, 0
    while todo:
        item = todo.pop()
        n += 1
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, int):
            characters += item.bit_length() // 3
        elif isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            todo += item
        check_items(n + len(todo))
        check_length(characters)
    return n, characters


def check_power(base: Any, exponent: Any) -> None:
    numbers = isinstance(base, int) and isinstance(exponent, int)
    if numbers and max(base.bit_length(), 1) * abs(exponent) > _BITS:
        raise TooMuchError('makes a number of thousands of digits')


def check_product(value: Any, times: Any) -> None:
    if isinstance(times, int):
        if isinstance(value, int) and value.bit_length() + times.bit_length() > _BITS:
            raise TooMuchError('makes a number of thousands of digits')
        if isinstance(value, list | tuple):
            check_items(len(value) * times)

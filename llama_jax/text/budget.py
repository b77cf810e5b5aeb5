"""How much time and memory a chat template may take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from llama_jax.text.marked import LONGEST, TooMuchError, check_length

SECONDS = 2.0
"""Of processor time for one rendering; real templates take milliseconds."""
CHARACTERS = 4 * LONGEST
"""Of all strings made in one rendering."""
_ITEMS = 1 << 20
"""Of one list or object, with all that is within."""
_BITS = 4096
"""Of a number that is multiplied."""


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
            self.characters -= _n_items(value)
        if self.characters < 0:
            raise TooMuchError(f'makes more than {CHARACTERS} characters')
        return value


CURRENT: ContextVar[Budget] = ContextVar('CURRENT')


def tick() -> Budget:
    budget = CURRENT.get()
    budget.tick()
    return budget


def _n_items(value: Any) -> int:
    """Items of a list or an object with all that is within, as often as it is there: printing and
    comparing go through all of it."""
    todo, n, characters = [value], 0, 0
    while todo:
        item = todo.pop()
        n += 1
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            todo += item
        if n + len(todo) > _ITEMS:
            raise TooMuchError(f'makes a list of more than {_ITEMS} items')
        check_length(characters)
    return n


def check_power(base: Any, exponent: Any) -> None:
    numbers = isinstance(base, int) and isinstance(exponent, int)
    if numbers and max(base.bit_length(), 1) * abs(exponent) > _BITS:
        raise TooMuchError('makes a number of thousands of digits')


def check_product(value: Any, times: Any) -> None:
    if isinstance(times, int):
        if isinstance(value, int) and value.bit_length() + times.bit_length() > _BITS:
            raise TooMuchError('makes a number of thousands of digits')
        if isinstance(value, list | tuple) and len(value) * times > _ITEMS:
            raise TooMuchError(f'makes a list of more than {_ITEMS} items')

"""Sparse attention: which of the keys in view a query looks at.

A pattern speaks of places in a row (counted from its first token), and comes on top of all else
that decides what is seen: the segment, causality and the prefix. Every token sees itself. At a
fixed pattern the cost of attention grows linearly with the length of the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.errors import UserError

Places = Any
"""Places of queries or of keys: integer arrays of jax or numpy, which broadcast to each other."""


@dataclass(frozen=True)
class Dense:
    """Every key."""

    def allows(self, query: Places, key: Places) -> Places:
        """True where the query looks at the key."""
        return (query >= 0) | (key >= 0)


@dataclass(frozen=True)
class Window:
    """The keys less than `size` places away (Beltagy et al. 2020, section 3.1): causally a token
    and the `size` - 1 before it, else as many after it too."""

    size: int

    def __post_init__(self) -> None:
        _check(self, size=1)

    def allows(self, query: Places, key: Places) -> Places:
        """True where the query looks at the key."""
        return abs(query - key) < self.size


@dataclass(frozen=True)
class Dilated:
    """Every `dilation`-th key of a window `size` x `dilation` wide (Beltagy et al. 2020, section
    3.1; strided attention of Child et al. 2019, section 4.3)."""

    size: int
    dilation: int

    def __post_init__(self) -> None:
        _check(self, size=1, dilation=1)

    def allows(self, query: Places, key: Places) -> Places:
        """True where the query looks at the key."""
        apart = abs(query - key)
        return (apart < self.size * self.dilation) & (apart % self.dilation == 0)


@dataclass(frozen=True)
class BlockGlobal:
    """The keys of a token's own block of `block` places, and `n_global` tokens at the beginning of
    the row which see all and are seen by all (Zaheer et al. 2020, section 2).

    Blocks and global tokens belong to the row: of several documents packed into one, the first
    alone has global tokens. Meant for rows of one document.
    """

    block: int
    n_global: int = 0

    def __post_init__(self) -> None:
        _check(self, block=1, n_global=0)

    def allows(self, query: Places, key: Places) -> Places:
        """True where the query looks at the key."""
        own = query // self.block == key // self.block
        return own | (query < self.n_global) | (key < self.n_global)


Pattern = Dense | Window | Dilated | BlockGlobal


def mask(pattern: Pattern, n_queries: int, n_keys: int, *, causal: bool) -> np.ndarray:
    """The whole mask [T, S] of one segment, on the host: for kernels that want it in advance."""
    query, key = np.arange(n_queries)[:, None], np.arange(n_keys)
    seen = np.broadcast_to(np.asarray(pattern.allows(query, key)), (n_queries, n_keys))
    return seen & (query >= key) if causal else seen


def _check(pattern: Pattern, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(pattern, name)
        if value < smallest:
            kind = type(pattern).__name__
            raise UserError(f'{kind}: {name} is {value}, it must be {smallest} or more')

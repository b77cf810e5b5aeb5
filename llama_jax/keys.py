"""Keys of random streams."""

from __future__ import annotations

import zlib

import jax


def named_key(key: jax.Array, name: str) -> jax.Array:
    """The key of the stream called `name`, apart from all that `jax.random.split` makes of `key`:
    `fold_in(key, i)` with a small number is `split(key, n)[i]`, and so draws the same."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) | 1 << 31)

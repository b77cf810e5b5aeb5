"""Splits by hash: where a document belongs depends on nothing but its name (or its text)."""

import hashlib

NAMES = ('train', 'validation', 'test')
_HELD_OUT = 0.05


def position(name: str | bytes) -> float:
    """A number in [0, 1) that follows from the name alone (in UTF-8, where it is bytes)."""
    name = name.encode() if isinstance(name, str) else name
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), 'big') / 2**64


def by_position(x: float) -> str:
    """'validation' for 5% of the positions, 'test' for another 5%, else 'train'."""
    if x < _HELD_OUT:
        return 'validation'
    return 'test' if x < 2 * _HELD_OUT else 'train'


def by_hash(name: str) -> str:
    """The split of a name."""
    return by_position(position(name))

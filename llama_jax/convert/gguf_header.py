"""What stands in front of the numbers of a GGUF file (versions 2 and 3, little-endian).

The reader of the package gguf makes an array of every string: seconds for a vocabulary, at every
start. This one makes plain values. Every size is compared with what is left of the file before
anything of that size is made.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAGIC = b'GGUF'
_STRING, _ARRAY = 8, 9
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), 'BbHhIif?Qqd', strict=True))
"""Formats of `struct` by the type's number in the file."""
_MOST_DIMS = 4
_LEAST_SETTING, _LEAST_INFO = 13, 24
"""Bytes that a setting and a tensor take at least here."""


@dataclass(frozen=True)
class Info:
    """Where a tensor lies."""

    name: str
    shape: tuple[int, ...]
    """Of its entries, as numpy counts them."""
    kind: int
    """The number of its type."""
    start: int
    """Byte of the file."""


def is_gguf(path: Path) -> bool:
    """Whether a file is one by its name, or else by how it begins: Ollama keeps them without an
    ending."""
    if path.suffix.lower() == '.gguf':
        return True
    try:
        with path.open('rb') as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def parse(data: memoryview) -> tuple[dict[str, Any], list[Info]]:
    """Settings and tensors of a file. Raises ValueError for what is none, or ends too early."""
    reader = _Reader(data)
    if bytes(data[:4]) != _MAGIC:
        raise ValueError('it does not begin with GGUF')
    reader.at = 4
    (version,) = reader.numbers('I', 1)
    if version in (2 << 24, 3 << 24):
        raise ValueError('it is big-endian, and only little-endian files can be read')
    if version not in (2, 3):
        raise ValueError(f'version {version}, and there are 2 and 3')
    n_tensors, n_settings = reader.numbers('Q', 2)
    reader.check(n_tensors * _LEAST_INFO + n_settings * _LEAST_SETTING)
    settings: dict[str, Any] = {}
    for _ in range(n_settings):
        name = reader.string()
        if name in settings:
            raise ValueError(f'two settings {name!r}')
        settings[name] = reader.value(reader.numbers('I', 1)[0])
    found: dict[str, tuple] = {}
    for _ in range(n_tensors):
        name = reader.string()
        (n_dims,) = reader.numbers('I', 1)
        if name in found or n_dims > _MOST_DIMS:
            raise ValueError(f'tensor {name!r} is there twice, or has {n_dims} dimensions')
        shape = reader.numbers('Q', n_dims)[::-1]
        found[name] = shape, reader.numbers('I', 1)[0], reader.numbers('Q', 1)[0]
    alignment = settings.get('general.alignment', 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f'general.alignment is {alignment!r}')
    begin = -(-reader.at // alignment) * alignment
    for name, (_, _, offset) in found.items():
        if offset % alignment:
            raise ValueError(f'tensor {name!r} is at {offset}, no multiple of {alignment}')
    return settings, [
        Info(name, shape, kind, begin + offset) for name, (shape, kind, offset) in found.items()
    ]


class _Reader:
    def __init__(self, data: memoryview):
        self._data, self.at = data, 0

    def check(self, n: int) -> None:
        """Raise ValueError where fewer bytes are left."""
        if n > len(self._data) - self.at:
            raise ValueError('it ends too early')

    def take(self, n: int) -> memoryview:
        self.check(n)
        part = self._data[self.at : self.at + n]
        self.at += n
        return part

    def numbers(self, code: str, n: int) -> tuple[Any, ...]:
        return struct.unpack(f'<{n}{code}', self.take(n * struct.calcsize(f'<{code}')))

    def string(self) -> str:
        (n,) = self.numbers('Q', 1)
        return str(self.take(n), 'utf-8')

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind], 1)[0]
        if kind != _ARRAY:
            raise ValueError(f'a value of type {kind}')
        (inner,), (n,) = self.numbers('I', 1), self.numbers('Q', 1)
        if inner in _NUMBERS:
            return list(self.numbers(_NUMBERS[inner], n))
        if inner != _STRING:
            raise ValueError(f'an array of type {inner}')
        self.check(8 * n)
        return [self.string() for _ in range(n)]

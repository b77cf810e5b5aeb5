"""GGUF files, of one part or several: settings, and tensors that are read when asked for.

Quantised tensors are dequantised to float32, the others have the type of the file. Needs the extra
`weights` (`gguf`), which dequantises.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert import gguf_header, gguf_rope, stored
from llama_jax.convert.stored import FLOATS, Place, damaged, opened
from llama_jax.convert.tensors import Tensors
from llama_jax.errors import UserError

_PART = re.compile(r'(.+)-\d{5}-of-(\d{5})\.gguf')
_ROW = 2**14
"""A sixteenth of the entries that are dequantised at a time."""


@dataclass(frozen=True)
class File:
    """What a GGUF file holds, or all parts of one."""

    settings: Mapping[str, Any]
    """Plain values and lists by key; those of the first part."""
    tensors: Tensors
    """Each read, and dequantised to float32 if it is quantised, when asked for."""
    rope_factors: Mapping[str, np.ndarray]
    """Those of gguf_rope.TENSORS that it has, float32."""


def read(path: Path) -> File:
    """The file at `path`, or all of which it is a part. Reads what stands before the numbers.

    Raises UserError when a file is missing, not whole, or holds types that cannot be read.
    """
    settings, tensors = _part(path)
    n_parts = settings.get('split.count', 0)
    if n_parts not in (0, 1):
        settings, tensors = _parts(path, n_parts)
    names = [name for name in gguf_rope.TENSORS if name in tensors]
    factors = {name: tensors.pop(name).read().astype(np.float32) for name in names}
    return File(settings, _Lazy(tensors), factors)


def _parts(path: Path, n: Any) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Of all `n` parts, whichever of them `path` is."""
    name = _PART.fullmatch(path.name)
    if not isinstance(n, int) or not name or int(name[2]) != n:
        raise UserError(
            f'{path} is one of {n} parts and must be called so, as in model-00001-of-00003.gguf: '
            'give it its name back, beside the others'
        )
    paths = [path.with_name(f'{name[1]}-{i:05}-of-{n:05}.gguf') for i in range(1, n + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise UserError(f'{path} is one of {n} parts; missing beside it: {", ".join(missing)}')
    settings: dict[str, Any] = {}
    tensors: dict[str, _Tensor] = {}
    for i, part in enumerate(paths):
        own, found = _part(part)
        place = own.get('split.no', i), own.get('split.count')
        twice = tensors.keys() & found.keys()
        if place != (i, n) or twice:
            what = (
                f'the tensor {min(twice)!r} once more' if twice else f'part {place[0]} of another'
            )
            raise UserError(f'{part} holds {what}: copy all parts again from where they came')
        settings, tensors = settings or own, tensors | found
    total = settings.get('split.tensors.count', len(tensors))
    if total != len(tensors):
        raise UserError(
            f'{path} and its other parts hold {len(tensors)} tensors of {total}: copy all parts '
            'again from where they came'
        )
    return settings, tensors


def _part(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Settings and tensors of one file."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:  # an empty file cannot be mapped
            raise damaged(path, 'it is empty')
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            try:
                settings, infos = gguf_header.parse(view)
                return settings, {info.name: _tensor(path, size, info) for info in infos}
            except UserError as error:
                raise UserError(f'{path}: {error}') from None
            except ValueError as error:
                why = str(error)
    raise damaged(path, why)


@dataclass(frozen=True)
class _Tensor:
    """A tensor within a file."""

    place: Place
    """Of its bytes, [rows, bytes]: rows of another length than those of the matrix."""
    kind: Any
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return FLOATS.get(self.kind.name, np.dtype(np.float32))

    def read(self) -> np.ndarray:
        from gguf import dequantize

        raw = stored.read(self.place)
        if self.kind.name in FLOATS:
            return raw.view(self.dtype).reshape(self.shape)
        return dequantize(raw, self.kind).astype(np.float32, copy=False).reshape(self.shape)


def _tensor(path: Path, size: int, info: gguf_header.Info) -> _Tensor:
    """Raises ValueError where it is not within the `size` bytes of the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(info.kind)
    except ValueError:
        raise _unreadable(info.name, str(info.kind)) from None
    if kind.name not in FLOATS and not _can_dequantize(kind):
        raise _unreadable(info.name, kind.name)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = math.prod(info.shape) // block
    if (info.shape and info.shape[-1] % block) or info.start + n_blocks * block_bytes > size:
        raise ValueError(f'tensor {info.name!r} is cut off')
    row = math.gcd(n_blocks, _ROW // block)  # the package takes 16 rows at a time
    rows = (n_blocks // row if row else 0, row * block_bytes)
    place = Place(path, kind.name, np.dtype(np.uint8), rows, info.start)
    return _Tensor(place, kind, info.shape)


@functools.cache
def _can_dequantize(kind: Any) -> bool:
    """Whether the package does: it says so only when it is asked to."""
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _unreadable(name: str, kind: str) -> UserError:
    return UserError(
        f'GGUF: tensor {name!r} is of type {kind}, which cannot be read: take the model in another '
        'quantisation, such as Q8_0, or a newer package gguf'
    )


class _Lazy(Tensors):
    """Tensors of files, each read when asked for."""

    def __init__(self, tensors: Mapping[str, _Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].dtype

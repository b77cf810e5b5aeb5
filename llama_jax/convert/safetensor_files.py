"""Where the tensors of a safetensors file are: 8 bytes with the length of the header, the header in
JSON, the numbers (https://huggingface.co/docs/safetensors, Format).

The library maps the file, and reads bfloat16 only for frameworks that have it; see `stored`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert.stored import FLOATS, Place, damaged, object_of, opened
from llama_jax.errors import UserError

_LONGEST_HEADER = 100_000_000
"""The library refuses longer ones as well."""
_DTYPES = {**FLOATS, 'F64': np.dtype(np.float64)}


def places(path: Path) -> dict[str, Place]:
    """The tensors of a file by name. Nothing but the header is read.

    Raises UserError when the file is none, or does not hold what its header says.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), 'little')
        if size < 8 or length > _LONGEST_HEADER:
            raise damaged(path, 'it does not begin as safetensors do')
        if 8 + length > size:
            raise damaged(path, f'it ends within its header, after {size} bytes')
        data = file.read(length)
    if not data.startswith(b'{'):
        raise damaged(path, 'it does not begin as safetensors do')
    header = object_of(path, data)
    header.pop('__metadata__', None)
    begin, end, found = 8 + length, 0, {}
    for name, info in header.items():
        try:
            found[name], end_here = _place(path, info, begin)
        except (KeyError, TypeError, ValueError):
            raise damaged(path, f'its header does not say where {name!r} is') from None
        end = max(end, end_here)
    if begin + end != size:
        wanted = begin + end
        raise damaged(path, f'it has {size} bytes and its header describes {wanted}')
    _check_apart(path, header)
    return found


def _place(path: Path, info: Any, begin: int) -> tuple[Place, int]:
    """Of one entry of the header, and where it ends in the numbers."""
    start, end = info['data_offsets']
    kind, shape = info['dtype'], tuple(info['shape'])
    if not all(type(n) is int and n >= 0 for n in (start, end, *shape)):
        raise ValueError
    dtype = _DTYPES.get(kind)
    if start > end or dtype and math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError
    return Place(path, kind, dtype, shape, begin + start), end


def _check_apart(path: Path, header: dict[str, Any]) -> None:
    """Raise UserError where two tensors share bytes: one of them is not what was written."""
    spans = sorted((*info['data_offsets'], name) for name, info in header.items())
    for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise UserError(
                f'{path} is damaged, {name!r} and {other!r} are at the same place: fetch it again'
            )

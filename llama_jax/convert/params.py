"""Parameters from the tensors of another code base: read one at a time, stacked on the host, or
stacked on a mesh."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from llama_jax import layout, trees
from llama_jax.convert.fit import Fitted, entry, fitted
from llama_jax.convert.tensors import ROTATED, InMemory, Scheme, Tensors, sizes_of
from llama_jax.data.progress import Progress
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.unread import Unread

_THREADS = 4
"""Tensors that are read at a time."""
_PART = 2**18
"""Entries that are looked at at a time: they stay in a processor's cache."""


def unread(
    scheme: Scheme, tensors: Mapping[str, np.ndarray], config: ModelConfig
) -> tuple[ModelConfig, Params]:
    """The architecture as the tensors have it (see `fit.fitted`, also for the errors), and its
    parameters with layers apart, each to be read when it is asked for."""
    if not isinstance(tensors, Tensors):
        tensors = InMemory(tensors)
    fit = fitted(scheme, tensors, config)
    n_bytes = sum(_n_bytes(fit.tensors, name) for name in fit.names.values())

    @functools.cache
    def progress() -> Progress:  # which counts time from here on: what is found may be read later
        return Progress('reading weights', n_bytes)

    def leaf(path: str, spec: Any) -> Unread:
        return _leaf(scheme, fit, path, spec.ndim, progress)

    shapes = jax.eval_shape(layers.unstack, layers.abstract(fit.config))
    return fit.config, trees.map_named(leaf, shapes)


def to_params(scheme: Scheme, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Stacked float32 parameters (numpy, on the host) of `config` from `tensors`.

    Raises UserError as `unread` does, and when the tensors are of another architecture.
    """
    found, params = unread(scheme, tensors, config)
    for path, field in (('embed_VD', 'vocab'), ('embed_VD', 'ids'), ('head_VD', 'tied')):
        here, said = getattr(found, field), getattr(config, field)
        if here != said:
            raise UserError(
                f'tensor {scheme.table[path][0]!r} makes a model with {field} {here}, the settings '
                f'say {said}'
            )
    return stacked(params)


def stacked(params: Params) -> Params:
    """`unread` parameters, read: float32, on the host, layers together."""
    return _by_stack(lambda _, parts: _read(parts), params)


def placed(
    params: Params, mesh: Mesh, each: Callable[[str, jax.Array], Any] | None = None
) -> Params:
    """`unread` parameters, read: float32, layers together, each array on its devices (see
    `layout.shardings`). The host holds one of them at a time.

    `each`: what becomes of an array, by its path, before the next is read; it comes in the type of
    its file.
    """

    def place(path: str, parts: Unread | list[Unread]) -> Any:
        dtype = np.float32 if each is None else None
        whole = _read(parts, dtype)
        (sharding,) = layout.shardings({path: whole}, mesh).values()
        x = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
        return jax.block_until_ready(x if each is None else each(path, x))

    return _by_stack(place, params)


def _by_stack(make: Callable[[str, Unread | list[Unread]], Any], params: Params) -> Params:
    """A tree with layers together, each leaf made of those of all layers."""
    blocks = params['blocks']
    rest = {name: value for name, value in params.items() if name != 'blocks'}
    together = trees.map_named(lambda path, *parts: make(path, list(parts)), blocks[0], *blocks[1:])
    return {**trees.map_named(make, rest), 'blocks': together}


def _read(parts: Unread | list[Unread], dtype: Any = np.float32) -> np.ndarray:
    """One, or those of all layers stacked; without a `dtype` in their own, or float32 where they
    are of several. A few are read at a time."""
    if isinstance(parts, Unread):
        return parts.read().astype(dtype or parts.dtype, copy=False)
    if dtype is None:
        dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else np.float32
    first = parts[0].read()
    # Room in the order of the file: to turn the numbers around costs less on their way to a device.
    order = sorted(range(first.ndim), key=lambda axis: -first.strides[axis])
    room = np.empty((len(parts), *(first.shape[axis] for axis in order)), dtype)
    room = room.transpose(0, *(1 + order.index(axis) for axis in range(first.ndim)))

    def fill(i: int) -> None:
        room[i] = first if i == 0 else parts[i].read()

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(parts))))
    return room


def _leaf(
    scheme: Scheme, fit: Fitted, path: str, ndim: int, progress: Callable[[], Progress]
) -> Unread:
    theirs, groups = fit.names[path], entry(scheme, path)[1]
    sizes = sizes_of(fit.config)
    letters, apart = layout.letters_of(path, ndim), groups.replace(',', '')
    n_rows = sizes['V'] if apart[0] == 'V' else None
    dtype = fit.tensors.dtype(theirs)

    def read() -> np.ndarray:
        shown = progress()
        w = np.asarray(fit.tensors[theirs])
        if w.dtype.itemsize > 4:
            w = w.astype(np.float32)
        if not finite(w):
            raise UserError(
                f'{fit.tensors.where(theirs)} holds numbers that are not finite (NaN or infinity): '
                'the file is damaged or its training failed; fetch it again, or take another '
                'checkpoint'
            )
        shown.add(_n_bytes(fit.tensors, theirs))
        if n_rows is not None and len(w) < n_rows:
            w = np.concatenate([w, np.zeros((n_rows - len(w), w.shape[1]), w.dtype)])
        w = w.reshape([sizes[letter] for letter in apart])
        w = scheme.from_pairs(w) if path.endswith(ROTATED) else w
        return w.transpose([apart.index(letter) for letter in letters])

    shape = tuple(sizes[letter] for letter in letters)
    return Unread(shape, dtype if dtype.itemsize <= 4 else np.dtype(np.float32), read)


def finite(w: np.ndarray) -> bool:
    """Whether all entries are: their exponents have a zero bit. A pass through memory, and no
    copy."""
    info = ml_dtypes.finfo(w.dtype)
    unsigned = np.dtype(f'uint{info.bits}')
    mask = unsigned.type((1 << info.nexp) - 1 << info.nmant)
    flat = w.reshape(-1).view(unsigned)
    return not any(((flat[i : i + _PART] & mask) == mask).any() for i in range(0, flat.size, _PART))


def _n_bytes(tensors: Tensors, name: str) -> int:
    return math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize

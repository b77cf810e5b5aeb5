"""Parameters as decoding reads them, made one array at a time: what they are made of is read, put
on its devices, quantised or cast, and let go before the next. Beside the result no more than one
array and its parts is in memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax import layout
from llama_jax.generate import columns
from llama_jax.generate.decode import Model
from llama_jax.generate.quantized import NOTHING, Quantization, by_rows, placements, quantized
from llama_jax.generate.recipe import Joined, Part, alone, parts, scale_of, with_adapters
from llama_jax.layout import QUANTIZED
from llama_jax.mesh import platform_in_use
from llama_jax.model.layers import STACKS, Params
from llama_jax.model.quantized import Quantized, dense
from llama_jax.model.unread import Unread
from llama_jax.trees import map_named

_BLOCK = 2**22
"""Entries of an array that are quantised at a time."""


@dataclass(frozen=True)
class How:
    """What is done to every array."""

    dtype: jnp.dtype
    """Of the computation."""
    matrices: jnp.dtype
    """Of matrices that are not quantised, and of the embedding."""
    head_copies: int
    """So many of each key-value head, one after the other."""
    quantization: Quantization = NOTHING
    whole_int4: bool = False
    """Matrices of int4 are rounded to it, and kept in float32."""


def prepare(model: Model, params: Params, how: How, *, mesh: Mesh) -> Params:
    """Parameters for decoding only, from such as are in training or `Unread`: layers apart,
    quantised or else in the type of `how`, arranged for the model's program, and gathered over the
    axes that a step would otherwise gather them over again and again."""
    make = _Maker(how, mesh)
    with jax.set_mesh(mesh):
        recipe = _recipe(model, params, how)
        # The embedding and the head first, the largest: little else is in memory then.
        first = {name: joined for name, joined in recipe.items() if name not in STACKS}
        made = map_named(make, first)
        _give_back()
        made |= map_named(make, {name: recipe[name] for name in recipe if name in STACKS})
        if model.in_columns:
            tables = functools.partial(columns.tables, model.config)
            placed = placements(jax.eval_shape(tables), mesh)
            made |= jax.jit(tables, out_shardings=placed)()
    _give_back()
    return with_adapters(made, scale_of(params))


def _give_back() -> None:
    """Memory that was let go, to the system: the C library of Linux would keep some of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def prepared(model: Model, params: Params, how: How) -> Params:
    """What `prepare` makes, in one expression and placed nowhere: for shapes alone."""
    make = functools.partial(_whole, how)
    tables = columns.tables(model.config) if model.in_columns else {}
    return with_adapters(map_named(make, _recipe(model, params, how)) | tables, scale_of(params))


def _recipe(model: Model, params: Params, how: How) -> Params:
    """What each array is made of: a tree of Joined."""

    def keep(w: Quantized) -> bool:
        """It is in the bits that are wanted, if any; a CPU wants groups, those of int4, as
        float32."""
        sizes = zip(w.value.shape, w.scale.shape, strict=True)
        if platform_in_use() == 'cpu' and any(1 < n < size for size, n in sizes):
            return False
        return how.quantization.weights in (None, w.value.dtype.name)

    def apart(blocks: Any, layer: int) -> Params:
        if isinstance(blocks, list):
            return parts(blocks[layer], None, keep=keep)
        return parts(blocks, layer, keep=keep)

    tree: Params = {}
    for name, value in params.items():
        if name not in STACKS:
            tree |= parts({name: value}, None, keep=keep)
            continue
        many = isinstance(value, list)
        n_layers = len(value) if many else jax.tree.leaves(value)[0].shape[0]
        tree[name] = [apart(value, i) for i in range(n_layers)]
    return columns.arrange(tree, model.config) if model.in_columns else alone(tree)


class _Maker:
    """Makes one array after the other. Layers share their programs."""

    def __init__(self, how: How, mesh: Mesh):
        self._how, self._mesh = how, mesh
        self._programs: dict[tuple, Callable[..., Any]] = {}

    def __call__(self, path: str, joined: Joined) -> Any:
        kind = re.sub(r'\.\d+\.', '.', path)
        if any(isinstance(part.value, jax.Array | Quantized) for part in joined.parts):
            return self._of_devices(kind, joined)
        # On the host arrays are joined in the order of the file, which a CPU's program likes too.
        x = joined.join(*(_copied(part.path, _read(part), self._how) for part in joined.parts))
        made = [self._of_host(kind, rows) for rows in self._cut(kind, x)]
        if x.nbytes > _BLOCK:
            _give_back()
        if len(made) == 1:
            return made[0]

        def together(*parts: Any) -> Any:
            return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)

        return jax.block_until_ready(self._program(kind, together, *made))

    def _cut(self, kind: str, x: np.ndarray) -> list[np.ndarray]:
        """Some rows at a time where each is quantised by itself: what lies between, in float32, is
        several times as large as the result."""
        first = layout.act(layout.letters_of(kind, x.ndim))[0]
        is_divided = first is not None and self._mesh.shape[first] > 1
        if is_divided or not by_rows(kind, self._how.quantization):
            return [x]
        size = -(-len(x) // -(-x.size // _BLOCK))
        return [x[i : i + size] for i in range(0, len(x), size)]

    def _of_host(self, kind: str, x: np.ndarray) -> Any:
        placed = NamedSharding(self._mesh, layout.act(layout.letters_of(kind, x.ndim)))
        on_devices = jax.make_array_from_callback(x.shape, placed, lambda index: x[index])
        made = self._program(kind, functools.partial(_finished, self._how, kind), on_devices)
        jax.block_until_ready(made)
        on_devices.delete()
        return made

    def _of_devices(self, kind: str, joined: Joined) -> Any:
        layers = {part.layer for part in joined.parts}
        (layer,) = layers
        stacked = layer is not None

        def one(x: jax.Array, i: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(x, i, keepdims=False) if stacked else x

        def whole(i: jax.Array, *values: Any) -> Any:
            parts = [
                Part(part.path, jax.tree.map(functools.partial(one, i=i), x))
                for part, x in zip(joined.parts, values, strict=True)
            ]
            return _whole(self._how, kind, Joined(tuple(parts), joined.join))

        values = (part.value for part in joined.parts)
        return jax.block_until_ready(self._program(kind, whole, np.int32(layer or 0), *values))

    def _program(self, kind: str, f: Callable[..., Any], *arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        key = kind, *((x.shape, str(x.dtype)) for x in leaves)
        if key not in self._programs:
            placed = placements({kind: jax.eval_shape(f, *arguments)}, self._mesh)[kind]
            self._programs[key] = jax.jit(f, out_shardings=placed)
        return self._programs[key](*arguments)


def _read(part: Part) -> np.ndarray:
    value = part.value
    x = value.read() if isinstance(value, Unread) else np.asarray(value)
    return x if part.layer is None else x[part.layer]


def _whole(how: How, path: str, joined: Joined) -> Any:
    """An array from its parts, traced."""
    kind = re.sub(r'\.\d+\.', '.', path)
    parts = []
    for part in joined.parts:
        x = (
            part.value
            if part.layer is None
            else jax.tree.map(operator.itemgetter(part.layer), part.value)
        )
        x = dense(x, jnp.float32) if isinstance(x, Quantized) else x
        parts.append(_copied(part.path, x, how))
    return _finished(how, kind, joined.join(*parts))


def _copied(path: str, x: Any, how: How) -> Any:
    """Each key-value head as often as it is needed: query heads that follow each other share one,
    and its copies follow each other too."""
    letters = layout.letters_of(path, x.ndim)
    if how.head_copies == 1 or 'K' not in letters:
        return x
    repeat = np.repeat if isinstance(x, np.ndarray) else jnp.repeat
    return repeat(x, how.head_copies, axis=letters.index('K'))


def _finished(how: How, kind: str, x: jax.Array) -> Any:
    y = quantized(kind, x, how.quantization, whole_int4=how.whole_int4)
    if y is not x:
        return y
    # A copy where the type stays: the host's memory may be somebody's.
    if kind.endswith(QUANTIZED):
        return jnp.copy(x)
    is_matrix = x.ndim > 1 and not kind.rsplit('.', 1)[-1].startswith(('a_', 'b_'))
    return jnp.copy(x.astype(how.matrices if is_matrix else how.dtype))

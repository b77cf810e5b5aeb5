"""Where arrays lie: one table from the letters of a shape to the axes of the mesh.

Letters: B batch, T query position, S key position, D model, N query heads, K key-value heads,
G query heads per key-value head, H head, F hidden, V vocabulary, C position of the context, L
layers, J parts of a matrix that lie together, R rank of an adapter, Q places of a queue. An
array's name ends in its letters (`q_DNH`, `x_BTD`), and its placement is computed from them, never
written beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.errors import UserError
from llama_jax.trees import map_named, named

REPLICA_AXES = ('slice', 'data')
SHARD_AXIS = 'fsdp'
BATCH_AXES = (*REPLICA_AXES, SHARD_AXIS)
VOCAB_AXIS = 'tensor'
QUANTIZED = ('value', 'scale')
"""Arrays that stand for a quantised one; see model/quantized.py."""
_REDUCED = ('scale', 'rows', 'columns')
"""Arrays that have 1 in place of some dimensions of theirs: also the moments of optim/adafactor.py.
"""
_PARTS = {*QUANTIZED, *_REDUCED}

_STORED: dict[str, str | None] = {
    **dict.fromkeys('LGHCJRQ', None),
    'D': 'fsdp',
    **dict.fromkeys('NKFV', 'tensor'),
}
_IN_USE: dict[str, str | tuple[str, ...] | None] = {
    **dict.fromkeys('LTSDGHCJRQ', None),
    'B': BATCH_AXES,
    **dict.fromkeys('NKFV', 'tensor'),
}
_MEANING = {
    'B': 'the batch',
    'D': 'the model dimension',
    'N': 'the number of heads',
    'K': 'the number of key-value heads',
    'F': 'the hidden dimension of the feed-forward layer',
    'V': 'the vocabulary',
}


def param(letters: str) -> P:
    """Placement of a parameter (and of its gradient and optimizer state) at rest.

    A vector of one letter besides L (the scale of a norm) lies whole on every device: to gather it
    would cost more than to keep it.
    """
    if len(letters.replace('L', '')) < 2:
        return P(*[None] * len(letters))
    return P(*[_STORED[letter] for letter in letters])


def act(letters: str) -> P:
    """Placement of an activation, and of a parameter while it is in use."""
    return P(*[_IN_USE[letter] for letter in letters])


def of_scales(placed: P, shape: tuple[int, ...]) -> P:
    """Placement of the scales, of this shape, of a quantised array that is placed so: they lie
    whole where all entries share one."""
    return P(*(axes if n > 1 else None for n, axes in zip(shape, placed, strict=True)))


def rows() -> P:
    """Placement of host data by row: the first dimension is the batch, whatever follows."""
    return P(BATCH_AXES)


def interleaved(x: jax.Array, n: int) -> jax.Array:
    """Rows [B, ...] in n parts [n, B / n, ...]; part i takes rows i, i + n, ...: each device its
    own."""
    B, *rest = x.shape
    # Said, because of a part of one row JAX takes the other factor to be the batch.
    return jnp.moveaxis(jnp.reshape(x, (B // n, n, *rest), out_sharding=rows()), 1, 0)


def joined(x: jax.Array) -> jax.Array:
    """What `interleaved` took apart, [n, B / n, ...] -> [B, ...], the rows in the order before."""
    n, B, *rest = x.shape
    return jnp.reshape(jnp.moveaxis(x, 0, 1), (n * B, *rest), out_sharding=rows())


def gather(w: jax.Array, letters: str) -> jax.Array:
    """A parameter brought together over the fsdp axis for use (an all-gather).

    Its gradient goes the opposite way (a reduce-scatter).
    """
    return jax.reshard(w, act(letters))


def by_layer(f: Callable[[jax.Array], jax.Array], x: jax.Array, letters: str) -> jax.Array:
    """`f(x)` for an `f` that maps each layer of `x` [L, ...] by itself, and needs it whole.

    `letters` are those of one layer. The devices that divide its dimensions divide the layers in
    their place (an all-to-all, there and back), so that each layer is computed once among them; `f`
    also gets layers of zeros, up to a multiple of the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f(x)
    axes = [axis for axis in param(letters) if axis is not None]
    L, shards = x.shape[0], math.prod(mesh.shape[axis] for axis in axes)
    x = jnp.pad(x, [(0, -L % shards), *[(0, 0)] * len(letters)])
    # One axis after the other: the compiler knows no exchange for two at once, and would gather.
    ways = [
        P(
            tuple(axes[:n]) or None,
            *(axis if axis in axes[n:] else None for axis in param(letters)),
        )
        for n in range(len(axes) + 1)
    ]
    for way in ways[1:]:
        x = jax.reshard(x, way)
    x = f(x)
    for way in reversed(ways[:-1]):
        x = jax.reshard(x, way)
    return x[:L]


def letters_of(path: str, ndim: int) -> str:
    """Letters of the parameter at a dotted `path`; layers stacked for a scan put L in front. Those
    of a quantised one, or of factored moments, are of its array."""
    array, _, part = path.rpartition('.')
    path = array if part in _PARTS else path
    if not ndim:
        return ''
    letters = path.rsplit('_', 1)[-1]
    if not letters.isupper() or ndim - len(letters) not in (0, 1):
        raise ValueError(f'{path}: a name ends in the letters of its {ndim} dimensions')
    return 'L' * (ndim - len(letters)) + letters


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedSharding of every leaf of `tree`: by the letters of its name, or, of a part of an array
    (`value` and `scale`, `rows` and `columns`), of that array; scalars replicated; whole along K
    where the mesh does not divide the key-value heads, which only generation allows.

    Works on parameters and on anything that holds copies of their tree (an optimizer state).
    """

    def place(path: str, leaf: Any) -> NamedSharding:
        letters = letters_of(path, leaf.ndim)
        axes = list(param(letters))
        for i, letter in enumerate(letters):
            if letter == 'K' and axes[i] and leaf.shape[i] % mesh.shape[axes[i]]:
                axes[i] = None
        placed = P(*axes)
        reduced = path.rpartition('.')[2] in _REDUCED
        return NamedSharding(mesh, of_scales(placed, leaf.shape) if reduced else placed)

    return map_named(place, tree)


def at_rest(tree: Any) -> Any:
    """Arrays of a computation moved to where `shardings` stores what has their names."""
    placed = shardings(tree, jax.sharding.get_abstract_mesh())
    return jax.tree.map(lambda x, to: jax.reshard(x, to.spec), tree, placed)


def head_copies(kv_heads: int, mesh: Mesh) -> int:
    """How often each key-value head has to be there for the mesh to divide them; 1: it does so."""
    n_shards = mesh.shape[VOCAB_AXIS]
    return n_shards // math.gcd(kv_heads, n_shards)


def check(sizes: dict[str, int], mesh: Mesh, *, shared_heads: bool = False) -> None:
    """Raise UserError when a size does not divide over its mesh axes. `sizes` is by letter.
    `shared_heads`: a key-value head may be on several devices, each with some of its queries."""
    if shared_heads:  # what divides the query heads divides some number of copies as well
        sizes = {letter: size for letter, size in sizes.items() if letter != 'K'}
    for letter, size in sizes.items():
        for table in (_STORED, _IN_USE):
            axes = table.get(letter) or ()
            axes = (axes,) if isinstance(axes, str) else axes
            n_shards = 1
            for axis in axes:
                n_shards *= mesh.shape[axis]
            if size % n_shards:
                raise UserError(
                    f'{_MEANING[letter]} ({size}) does not divide over the {n_shards} shards of '
                    f'the mesh ({", ".join(axes)}): change the size or --mesh.{axes[-1]}'
                )


def check_params(tree: Any, mesh: Mesh) -> None:
    """Raise UserError when a parameter of `tree` does not divide over `mesh`; shapes are enough."""
    for (path, leaf), (_, placed) in zip(named(tree), named(shardings(tree, mesh)), strict=True):
        for size, axis in zip(leaf.shape, placed.spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f'{path} {list(leaf.shape)} does not divide over the {mesh.shape[axis]} shards '
                    f'of the mesh ({axis}): change its size or --mesh.{axis}'
                )

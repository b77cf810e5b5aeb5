"""What a run keeps as it is: the weights beside which it trains adapters or a head. They are in no
checkpoint, so they are read again from what `start` names, and have to be the same."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax import layout, precision
from llama_jax.errors import UserError
from llama_jax.generate.quantized import NOTHING, Quantization, quantized
from llama_jax.mesh import platform_in_use
from llama_jax.model.adapted import Adapted, Weight, dense
from llama_jax.model.config import Compute
from llama_jax.model.layers import STACKS, Params
from llama_jax.model.quantized import Quantized
from llama_jax.model.tune import GROUP, LoRA, Tune
from llama_jax.train.checkpoint import sum_of_words
from llama_jax.trees import map_named

Identity = Mapping[str, Any]
"""What `start` named, as a checkpoint records it: two are equal where the weights are."""


class Kept:
    """Makes each array of a base what a run keeps of it: matrices in their own type, or that of the
    computation where it is smaller, for they are cast to that at every use; int8 or int4 where
    `tune` says so; norms and biases float32."""

    def __init__(self, tune: Tune, compute: Compute | None, mesh: Mesh):
        """Without `compute` matrices keep the type that they have."""
        self._dtype = precision.dtype(compute.precision if compute else 'float32')
        bits = tune.base if isinstance(tune, LoRA) else None
        group = GROUP if bits == 'int4' else None
        self._how = Quantization(weights=bits, group=group) if bits else NOTHING
        self._mesh = mesh
        self._sums: dict[str, int] = {}

    def __call__(self, path: str, w: Weight) -> Weight:
        """Of one array, or of the merged one of an adapted weight; what it is made of is let
        go."""
        if isinstance(w, jax.Array):
            self._sums[path] = int(sum_of_words([w], float32=True))
        made = _remade(path, w, self._mesh, self._kept)
        if made is not w:
            for leaf in jax.tree.leaves(w):
                leaf.delete()
        return made

    def _kept(self, path: str, x: jax.Array) -> Weight:
        stacked = path.split('.')[0] in STACKS
        if x.ndim - stacked < 2:
            return x.astype(jnp.float32)
        if stacked and self._how != NOTHING:  # a layer at a time: what lies between is float32
            return jax.lax.map(
                lambda w: _storable(quantized(path, w, self._how, whole_int4=False)), x
            )
        return x.astype(self._dtype) if self._dtype.itemsize < x.dtype.itemsize else x

    def identity(self) -> Identity:
        """Of what it was given, whatever the files and the types that they are in."""
        text = json.dumps(sorted(self._sums.items()))
        return {'weights': hashlib.sha256(text.encode()).hexdigest()[:16]}


def _storable(w: Any) -> Any:
    """A CPU keeps int4 in bytes, and a program that was compiled ahead of time refuses them (jax
    0.10): there they are of int8, with the same values."""
    if not isinstance(w, Quantized) or w.value.dtype != jnp.int4 or platform_in_use() != 'cpu':
        return w
    return Quantized(w.value.astype(jnp.int8), w.scale)


def merged(params: Params, mesh: Mesh) -> Params:
    """Placed parameters as arrays of float32, to train or to write: adapters are added to their
    weights. Those that are such arrays are not copied."""
    return map_named(
        lambda path, w: _remade(path, w, mesh, lambda _, x: x.astype(jnp.float32)),
        params,
        is_leaf=lambda w: isinstance(w, Adapted | Quantized),
    )


def _remade(path: str, w: Weight, mesh: Mesh, make: Callable[[str, jax.Array], Weight]) -> Weight:
    """What `make` makes of the array that a weight stands for, at rest."""

    def remake(w: Weight) -> Weight:
        if isinstance(w, jax.Array):
            return make(path, w)
        name = path.rsplit('.', 1)[-1]
        one = functools.partial(dense, letters=name.rsplit('_', 1)[-1], dtype=jnp.float32)
        return make(path, jax.lax.map(one, w) if path.split('.')[0] in STACKS else one(w))

    with jax.set_mesh(mesh):
        form = jax.eval_shape(remake, w)
    if isinstance(w, jax.Array) and not isinstance(form, Quantized) and form.dtype == w.dtype:
        return w
    placed = layout.shardings({path: form}, mesh)[path]
    with jax.set_mesh(mesh):
        return jax.block_until_ready(jax.jit(remake, out_shardings=placed)(w))


def check_identity(recorded: Identity, found: Identity, named: str) -> None:
    """Raise UserError where what was `named` no longer is what a run began with."""
    if recorded != found:
        raise UserError(
            f'{named} is no longer what the run began with (weights '
            f'{recorded.get("weights")}, now {found.get("weights")}): what was trained is for '
            'those; bring them back, or begin again in another --workdir'
        )

"""Linear maps: the product that opens a sub-layer, from the residual stream to heads or hidden
units, the one that closes it, and biases."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax import layout
from llama_jax.model.adapted import Adapted, Weight, delta, product
from llama_jax.model.config import ModelConfig
from llama_jax.model.matmul import matmul
from llama_jax.model.quantized import Quantized


def in_use(w: nnx.Param, letters: str, dtype: jnp.dtype) -> Weight:
    """A weight of these letters gathered, in the type of the activations; quantised it stays so,
    and adapted as well."""
    value = w.get_value()
    if not isinstance(value, Adapted):
        return plain_in_use(w, letters, dtype)
    a, b = value.letters(letters)
    return replace(
        value,
        base=_gathered(value.base, letters, dtype),
        a=layout.gather(value.a.astype(dtype), a),
        b=layout.gather(value.b.astype(dtype), b),
    )


def plain_in_use(w: nnx.Param, letters: str, dtype: jnp.dtype) -> jax.Array | Quantized:
    """`in_use` of a weight that has no adapters."""
    return _gathered(w.get_value(), letters, dtype)


def _gathered(w: jax.Array | Quantized, letters: str, dtype: jnp.dtype) -> jax.Array | Quantized:
    if isinstance(w, Quantized):
        scale = jax.reshard(w.scale, layout.of_scales(layout.act(letters), w.scale.shape))
        return Quantized(layout.gather(w.value, letters), scale)
    return layout.gather(w.astype(dtype), letters)


def project(x_BTD: jax.Array, w: Weight, letters: str) -> jax.Array:
    """`x_BTD` times a weight [D, ...] of these letters, in use: [B, T, ...]."""
    out = f'BT{letters[1:]}'
    if isinstance(w, Adapted):
        added = delta(w, letters, x_BTD, 'BTD', out, first=False, dtype=x_BTD.dtype)
        return project(x_BTD, w.base, letters) + added
    if isinstance(w, Quantized):
        return product(f'BTD,{letters}->{out}', x_BTD, w, dtype=x_BTD.dtype)
    return matmul(x_BTD, w, letters)


def close(x: jax.Array, w: Weight, letters: str) -> jax.Array:
    """`x` [B, T, ...] times a weight [..., D] of these letters, in use: [B, T, D].

    Not an einsum: that contracts in alphabetical order, and H before N costs XLA a transposed copy
    of the weight at every use.
    """
    return product(f'BT{letters[:-1]},{letters}->BTD', x, w, dtype=x.dtype)


def bias(config: ModelConfig, *shape: int) -> nnx.Param | None:
    """A bias, zero at first; None where the configuration has none."""
    return nnx.Param(jnp.zeros(shape)) if config.bias else None


def shifted(x: jax.Array, bias: nnx.Param | None, letters: str) -> jax.Array:
    """`x` [B, T, ...] plus a bias of these letters, which are the last dimensions of `x`."""
    if bias is None:
        return x
    return x + layout.gather(bias[...].astype(x.dtype), letters)

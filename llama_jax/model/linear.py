"""Linear maps: the product that opens a sub-layer, from the residual stream to heads or hidden
units, the one that closes it, and biases."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax import layout
from llama_jax.model.adapted import Adapted, Weight, delta, product
from llama_jax.model.config import ModelConfig
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
    return _project(x_BTD, w, letters)


def close(x: jax.Array, w: Weight, letters: str) -> jax.Array:
    """`x` [B, T, ...] times a weight [..., D] of these letters, in use: [B, T, D].

    Not an einsum: that contracts in alphabetical order, and H before N costs XLA a transposed copy
    of the weight at every use.
    """
    return product(f'BT{letters[:-1]},{letters}->BTD', x, w, dtype=x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x_BTD: jax.Array, w: jax.Array, letters: str) -> jax.Array:
    """Its gradient is that of an einsum, in another order: of the two factors of the weight's
    gradient, `x` is the one that lies transposed. It has fewer columns than the gradient of the
    output, and gate and up, or query, key and value, share it. (Left to JAX, XLA:CPU computes the
    activation's gradient again in transposed order: a tenth of a training step.)
    """
    return jnp.einsum(f'BTD,{letters}->BT{letters[1:]}', x_BTD, w)


def _forward(x_BTD: jax.Array, w: jax.Array, letters: str) -> tuple[jax.Array, tuple]:
    return _project(x_BTD, w, letters), (x_BTD, w)


def _backward(letters: str, saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTD, w = saved
    last = tuple(range(2, gradient.ndim))
    dx_BTD = jax.lax.dot_general(
        gradient, w, ((last, tuple(i - 1 for i in last)), ((), ())), out_sharding=layout.act('BTD')
    )
    dw = jax.lax.dot_general(
        x_BTD, gradient, (((0, 1), (0, 1)), ((), ())), out_sharding=layout.act(letters)
    )
    return dx_BTD, dw


_project.defvjp(_forward, _backward)


def bias(config: ModelConfig, *shape: int) -> nnx.Param | None:
    """A bias, zero at first; None where the configuration has none."""
    return nnx.Param(jnp.zeros(shape)) if config.bias else None


def shifted(x: jax.Array, bias: nnx.Param | None, letters: str) -> jax.Array:
    """`x` [B, T, ...] plus a bias of these letters, which are the last dimensions of `x`."""
    if bias is None:
        return x
    return x + layout.gather(bias[...].astype(x.dtype), letters)

"""Arrays in 8 or 4 bits, and products with them that never make the whole array again.

Symmetric: x is about value * scale, with one scale for all that a product sums over (per channel),
or one for each group of it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.mesh import platform_in_use

_MOST = 127
_PART = 2 * _MOST
"""The second part of a split number counts in this fraction of the first."""
_TERMS = 2**17
"""So many products of two such integers can be summed in 32 bits."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """An array of integers, int8 or int4, and what they stand for."""

    value: Int[Array, ...]
    scale: Float[Array, ...]
    """Float32, with the dimensions of `value`: of their size, of size 1 where all entries share a
    scale, or, in one dimension, of the number of groups."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return self.value.ndim

    def transpose(self, order: tuple[int, ...]) -> Quantized:
        """The same with its dimensions in another order."""
        return Quantized(self.value.transpose(order), self.scale.transpose(order))


Weight = jax.Array | Quantized


def dense(w: Weight, dtype: Any) -> jax.Array:
    """The array that this stands for."""
    if not isinstance(w, Quantized):
        return w.astype(dtype)
    value, scale = w.value.astype(jnp.float32), w.scale  # int4 is not promoted
    for axis, (n, n_scales) in enumerate(zip(w.shape, scale.shape, strict=True)):
        if 1 < n_scales < n:
            value, scale = _in_groups(value, axis, n // n_scales), jnp.expand_dims(scale, axis + 1)
            return (value * scale).reshape(w.shape).astype(dtype)
    return (value * scale).astype(dtype)


def rows(w: Weight, index: Int[Array, ...], *, letters: str, dtype: Any) -> jax.Array:
    """Rows of an embedding, dense; `letters` are those of the result."""
    placed = layout.act(letters)
    if not isinstance(w, Quantized):
        return w.at[index].get(out_sharding=placed).astype(dtype)
    value = w.value.at[index].get(out_sharding=placed)
    return (value * w.scale.at[index].get(out_sharding=placed)).astype(dtype)


def quantize(
    x: jax.Array, summed: tuple[int, ...], *, bits: int = 8, group: int | None = None
) -> Quantized:
    """`x` rounded to `bits` bits. Products will sum over the dimensions `summed`: the scale is that
    of the largest number along them, or, with `group`, along groups of so many entries of the last
    of them, which has to divide into such.

    The error of an entry is at most half a step, 1/254 of the largest number (int8) or 1/14 (int4).
    """
    most = 2 ** (bits - 1) - 1
    x = x.astype(jnp.float32)
    parts = x if group is None else _in_groups(x, summed[-1], group)
    axes = summed if group is None else summed[-1] + 1
    largest = jnp.abs(parts).max(axis=axes, keepdims=True)
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny * most) / most
    value = jnp.round(parts / scale).astype(jnp.int8 if bits == 8 else jnp.int4)
    if group is None:
        return Quantized(value, scale)
    return Quantized(value.reshape(x.shape), scale.squeeze(axes))


def _in_groups(x: jax.Array, axis: int, group: int) -> jax.Array:
    """One dimension as two: groups, and entries of a group."""
    shape = (*x.shape[:axis], x.shape[axis] // group, group, *x.shape[axis + 1 :])
    return x.reshape(shape)


def product(expression: str, a: Weight, b: Weight, *, dtype: Any) -> jax.Array:
    """`einsum(expression, a, b)` of type `dtype`, where one of the two may be quantised.

    The result has first the letters that both keep, then what is left of `a`, then of `b`, and is
    placed by them. Sums run in the order of the letters of the quantised factor, else of `b`.

    On an accelerator integers are converted on their way into the product, and the scale is applied
    to what comes out of it: no array of floats the size of the integers is made. A CPU would make
    one, and be slow; it multiplies integers by integers (see `_in_two_parts`).
    """
    if isinstance(a, Quantized):
        assert not isinstance(b, Quantized)
        return _frozen_product(expression, True, dtype, a, b)
    if isinstance(b, Quantized):
        return _frozen_product(expression, False, dtype, b, a)
    of = _Dot.parse(expression, first=False)
    if {a.dtype.name, b.dtype.name} == {'bfloat16', 'float32'} and platform_in_use() == 'cpu':
        first = a.dtype == jnp.bfloat16
        of, (w, x) = _Dot.parse(expression, first=first), (a, b) if first else (b, a)
        return _in_two_bfloat16(of, w, x).astype(dtype)
    return of(b, a, dtype)


@dataclass(frozen=True)
class _Dot:
    """A product of `w` and `x`, by letters."""

    w: str
    x: str
    out: str
    first: bool
    """`w` is the left one of the two."""

    @staticmethod
    def parse(expression: str, *, first: bool) -> _Dot:
        factors, out = expression.split('->')
        left, right = factors.split(',')
        return _Dot(left, right, out, first) if first else _Dot(right, left, out, first)

    @property
    def summed(self) -> str:
        return ''.join(c for c in self.w if c not in self.out)

    def __call__(self, w: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
        batch = [c for c in self.w if c in self.x and c in self.out]
        left, right = (self.w, self.x) if self.first else (self.x, self.w)
        summed = ([left.index(c) for c in self.summed], [right.index(c) for c in self.summed])
        shared = ([left.index(c) for c in batch], [right.index(c) for c in batch])
        return jax.lax.dot_general(
            *((w, x) if self.first else (x, w)),
            (summed, shared),
            preferred_element_type=dtype,
            out_sharding=layout.act(self.out),
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _frozen_product(
    expression: str, first: bool, dtype: Any, w: Quantized, x: jax.Array
) -> jax.Array:
    """The product of a quantised weight, the left one of the two if it is `first`. Its gradient is
    that of `x` alone, a product with the same integers: the rounding of `_in_two_parts` has none,
    and the array of floats is not kept for it."""
    return _scaled(_Dot.parse(expression, first=first), w, x, dtype)


def _frozen_forward(
    expression: str, first: bool, dtype: Any, w: Quantized, x: jax.Array
) -> tuple[jax.Array, tuple[Quantized, jax.Array]]:
    # Of `x` the type alone is needed.
    return _frozen_product(expression, first, dtype, w, x), (w, jnp.zeros((), x.dtype))


def _frozen_backward(
    expression: str, first: bool, dtype: Any, kept: tuple[Quantized, jax.Array], dy: jax.Array
) -> tuple[None, jax.Array]:
    w, like = kept
    of = _Dot.parse(expression, first=first)
    return None, _scaled(replace(of, x=of.out, out=of.x), w, dy, like.dtype)


_frozen_product.defvjp(_frozen_forward, _frozen_backward)


def _scaled(of: _Dot, w: Quantized, x: jax.Array, dtype: Any) -> jax.Array:
    sizes = list(zip(of.w, w.shape, w.scale.shape, strict=True))
    inner = any(n > 1 for c, _, n in sizes if c in of.summed)
    outer = any(n > 1 for c, _, n in sizes if c not in of.x)
    if any(1 < n < size for _, size, n in sizes) or (inner and outer):
        return of(dense(w, x.dtype), x, dtype)  # in groups: the scale goes in with the integers
    if inner:  # a scale for what is summed belongs to the other factor
        x = (x * _spread(w.scale, of.w, of.x)).astype(x.dtype)
    n_terms = math.prod(n for c, n, _ in sizes if c in of.summed)
    if platform_in_use() == 'cpu' and w.value.dtype == jnp.int8 and n_terms <= _TERMS:
        y = _in_two_parts(of, w.value, x)
    else:
        y = of(w.value.astype(x.dtype), x, jnp.float32)
    return (y if inner else y * _spread(w.scale, of.w, of.out)).astype(dtype)


def _in_two_parts(of: _Dot, w: jax.Array, x: jax.Array) -> jax.Array:
    """The product of int8 values with floats, on a CPU, float32.

    Each number of `x` is split into two of 8 bits, so that it is known to 1/64516 of the largest of
    those that are summed with it, and products of integers do the rest, exactly. XLA's are fast
    where there are two columns or more, which two parts see to; they read a quarter of the bytes of
    float32.
    """
    axes = tuple(of.x.index(c) for c in of.summed)
    largest = jnp.abs(x).max(axis=axes, keepdims=True)
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny * _MOST) / _MOST
    high = jnp.round(x / scale)
    low = jnp.round((x / scale - high) * _PART)
    # The parts, numbered by L, stand in front of what x keeps: as columns beside its columns.
    kept = next(c for c in of.x if c not in of.w)
    both = jnp.stack([high, low], axis=of.x.index(kept)).astype(jnp.int8)
    of_both = replace(of, x=of.x.replace(kept, 'L' + kept), out=of.out.replace(kept, 'L' + kept))
    high, low = jnp.unstack(of_both(w, both, jnp.int32), axis=of.out.index(kept))
    return (high + low.astype(jnp.float32) / _PART) * _spread(scale, of.x, of.out)


def _in_two_bfloat16(of: _Dot, w: jax.Array, x: jax.Array) -> jax.Array:
    """The product of bfloat16 values with float32, on a CPU, float32.

    Each number of `x` is the sum of two of bfloat16 but for 1/65536 of it. XLA's products of
    bfloat16 sum in float32, and are fast where there are two columns or more and the processor has
    instructions for them; a product with float32 would make a float32 matrix first.
    """
    high = jax.lax.reduce_precision(x, 8, 7)  # a cast there and back is removed by the compiler
    kept = next(c for c in of.x if c not in of.w)
    both = jnp.stack([high, x - high], axis=of.x.index(kept)).astype(jnp.bfloat16)
    of_both = replace(of, x=of.x.replace(kept, 'L' + kept), out=of.out.replace(kept, 'L' + kept))
    high, low = jnp.unstack(of_both(w, both, jnp.float32), axis=of.out.index(kept))
    return high + low


def _spread(scale: jax.Array, letters: str, into: str) -> jax.Array:
    """`scale` with the dimensions of `letters`, made to be multiplied with an array of `into`: it
    has size 1 along the letters that this lacks."""
    common = [c for c in letters if c in into]
    order = sorted(common, key=into.index)
    scale = scale.squeeze(tuple(i for i, c in enumerate(letters) if c not in into))
    scale = scale.transpose([common.index(c) for c in order])
    return jnp.expand_dims(scale, tuple(i for i, c in enumerate(into) if c not in common))

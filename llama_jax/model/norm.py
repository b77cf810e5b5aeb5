"""Root-mean-square layer normalisation (Zhang & Sennrich 2019, eq. 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """Scales each vector to unit root mean square, then by a learned vector."""

    def __init__(self, dim: int, *, eps: float):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.ones(dim))

    def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        x_f32 = x_BTD.astype(jnp.float32)  # the mean of squares overflows and rounds in bfloat16
        square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
        normed = (x_f32 * jax.lax.rsqrt(square + self.eps)).astype(x_BTD.dtype)
        return normed * self.scale_D[...].astype(x_BTD.dtype)

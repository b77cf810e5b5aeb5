"""Layer normalisation, with the mean (Ba et al. 2016) or without (Zhang & Sennrich 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llama_jax.model.config import ModelConfig


class RMSNorm(nnx.Module):
    """Scales each vector to unit root mean square, then by a learned vector (Zhang & Sennrich 2019,
    eq. 4)."""

    def __init__(self, dim: int, *, eps: float, scale: float = 1.0):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.full(dim, scale, jnp.float32))

    def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        x_f32 = x_BTD.astype(jnp.float32)  # the mean of squares overflows and rounds in bfloat16
        square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
        normed = (x_f32 * jax.lax.rsqrt(square + self.eps)).astype(x_BTD.dtype)
        return normed * self.scale_D[...].astype(x_BTD.dtype)


class LayerNorm(nnx.Module):
    """Brings each vector to mean 0 and variance 1, then scales and shifts it (Ba et al. 2016,
    eq. 4)."""

    def __init__(self, dim: int, *, eps: float, scale: float = 1.0):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.full(dim, scale, jnp.float32))
        self.bias_D = nnx.Param(jnp.zeros(dim))

    def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        x_f32 = x_BTD.astype(jnp.float32)
        x_f32 = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
        normed = (x_f32 * jax.lax.rsqrt(variance + self.eps)).astype(x_BTD.dtype)
        return normed * self.scale_D[...].astype(x_BTD.dtype) + self.bias_D[...].astype(x_BTD.dtype)


Norm = RMSNorm | LayerNorm


def norm(config: ModelConfig, *, scale: float = 1.0) -> Norm:
    """The kind of norm that `config` asks for, of the model dimension; `scale` is its first one."""
    kind = RMSNorm if config.norm == 'rms' else LayerNorm
    return kind(config.dim, eps=config.norm_eps, scale=scale)

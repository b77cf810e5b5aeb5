"""Absolute positions, added to the embedding of a token."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sinusoidal(position_BT: Int[Array, 'B T'], *, dim: int) -> Float[Array, 'B T D']:
    """Sines (even dimensions) and cosines (odd ones) of wavelengths from 2 pi to 10000 x 2 pi
    (Vaswani et al. 2017, section 3.5), float32."""
    frequency = 1e4 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle_BTD = position_BT[..., None] * frequency
    wave_BTD2 = jnp.stack([jnp.sin(angle_BTD), jnp.cos(angle_BTD)], axis=-1)
    return wave_BTD2.reshape(*position_BT.shape, dim)

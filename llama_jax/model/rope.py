"""Rotary position embedding (Su et al. 2021), half-split pairs as in Hugging Face's weights.

Dimension i of a head is paired with i + H/2. Meta's own files pair 2i with 2i+1: the two are the
same function once the rows of the query and key projections are permuted (convert/).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.model.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, float32."""

    cos_BTH: Float[Array, 'B T 1 H/2']
    sin_BTH: Float[Array, 'B T 1 H/2']


def rotation(
    position_BT: Int[Array, 'B T'], *, head_dim: int, theta: float, scaling: RopeScaling | None
) -> Rotation:
    """Rotation for tokens at `position_BT`; computed once and used by every layer."""
    angle = position_BT[..., None, None] * frequencies(head_dim, theta=theta, scaling=scaling)
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotation_of(config: ModelConfig, position_BT: Int[Array, 'B T']) -> Rotation:
    """`rotation` with the settings of a model."""
    return rotation(
        position_BT,
        head_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
    )


def rotate(x_BTNH: Float[Array, 'B T N H'], by: Rotation) -> Float[Array, 'B T N H']:
    """Rotate queries or keys by their positions; computed in float32, returned as given."""
    return rotate_pairs(x_BTNH, by.cos_BTH, by.sin_BTH, axis=-1)


def rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array, *, axis: int) -> jax.Array:
    """`rotate` of an array whose heads lie along `axis`; `cos` and `sin` have half its size there
    and go with its other dimensions."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=axis)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return turned.astype(x.dtype)


def frequencies(head_dim: int, *, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angle per position of each pair, in radians: theta^(-2i/H), float32 [H/2]."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / theta**exponent
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_context / wavelength  # full turns within the original context
    # From `low` turns to `high` turns the stretch fades from full to none. Scout's low == high
    # leaves no room to fade: a step, not a division by zero.
    span = scaling.high - scaling.low
    kept = jnp.clip((turns - scaling.low) / span, 0, 1) if span else turns >= scaling.high
    return frequency * (kept + (1 - kept) / scaling.factor)

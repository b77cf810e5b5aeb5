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

from llama_jax.model.config import (
    Dynamic,
    Linear,
    LongRope,
    ModelConfig,
    RopeScaling,
    Scaling,
    Yarn,
    by_length,
)


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, times the attention factor; float32."""

    cos_BTH: Float[Array, 'B T 1 H/2']
    sin_BTH: Float[Array, 'B T 1 H/2']


def rotation(
    position_BT: Int[Array, 'B T'],
    *,
    head_dim: int,
    theta: float,
    scaling: Scaling | None,
    length_BT: Int[Array, 'B T'] | None = None,
) -> Rotation:
    """Rotation for tokens at `position_BT`; computed once and used by every layer. `length_BT`: of
    each token's sequence, or [B, 1] for all of a row; see `frequencies`."""
    length_BT1 = None if length_BT is None else length_BT[..., None]
    frequency = frequencies(head_dim, theta=theta, scaling=scaling, length=length_BT1)
    angle = position_BT[..., None, None] * frequency
    factor = attention_factor(scaling)
    return Rotation(jnp.cos(angle) * factor, jnp.sin(angle) * factor)


def rotation_of(
    config: ModelConfig,
    position_BT: Int[Array, 'B T'],
    *,
    segment_BT: Int[Array, 'B T'] | None = None,
    length_B: Int[Array, ' B'] | None = None,
) -> Rotation:
    """`rotation` with the settings of a model. Where that goes by length: a token's sequence is its
    segment (None: the row) up to the largest position there, or has the length `length_B`."""
    length_BT = None
    if by_length(config.rope_scaling):
        length_BT = _lengths(position_BT, segment_BT) if length_B is None else length_B[:, None]
    return rotation(
        position_BT,
        head_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
        length_BT=length_BT,
    )


def _lengths(position_BT: jax.Array, segment_BT: jax.Array | None) -> jax.Array:
    """Of the sequence that each token is of [B, T], or [B, 1] where it is the row."""
    if segment_BT is None:
        return position_BT.max(axis=1, keepdims=True) + 1
    same_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
    return jnp.where(same_BTS, position_BT[:, None, :], 0).max(axis=2) + 1


def rotate(x_BTNH: Float[Array, 'B T N H'], by: Rotation) -> Float[Array, 'B T N H']:
    """Rotate queries or keys by their positions; computed in float32, returned as given."""
    return rotate_pairs(x_BTNH, by.cos_BTH, by.sin_BTH, axis=-1)


def rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array, *, axis: int) -> jax.Array:
    """`rotate` of an array whose heads lie along `axis`; `cos` and `sin` have half its size there
    and go with its other dimensions."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=axis)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return turned.astype(x.dtype)


def frequencies(
    head_dim: int, *, theta: float, scaling: Scaling | None, length: jax.Array | None = None
) -> jax.Array:
    """Angle per position of each pair, in radians: theta^(-2i/H), stretched; float32 [H/2].

    `length`: of the sequence, [...]; where the rule goes by it, the result is [..., H/2]. None: it
    is within the original context.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / theta**exponent
    match scaling:
        case None:
            return frequency
        case Linear(factor):
            return frequency / factor
        case RopeScaling():
            return _llama3(frequency, scaling)
        case Yarn():
            return _yarn(frequency, scaling, head_dim=head_dim, theta=theta)
        case Dynamic(factor, original):
            if length is None:
                return frequency
            longer = jnp.maximum(length[..., None], original).astype(jnp.float32) / original
            growth = (factor * longer - (factor - 1)) ** (head_dim / (head_dim - 2))
            return 1.0 / (theta * growth) ** exponent
        case LongRope(short, long, original):
            short_h, long_h = (jnp.asarray(factors, jnp.float32) for factors in (short, long))
            if length is None:
                return frequency / short_h
            is_long = (length[..., None] > original).astype(jnp.float32)
            return frequency / (is_long * long_h + (1 - is_long) * short_h)


def attention_factor(scaling: Scaling | None) -> float:
    """What cosines and sines are multiplied by; scores by its square."""
    match scaling:
        case Yarn(factor, attention_factor=None):
            return paper_factor(factor)
        case Yarn(attention_factor=value) | LongRope(attention_factor=value) if value is not None:
            return value
    return 1.0


def paper_factor(factor: float) -> float:
    """YaRN's attention factor for a stretch (Peng et al. 2023, equation 22)."""
    return 1.0 + 0.1 * math.log(max(factor, 1.0))


def _llama3(frequency: jax.Array, scaling: RopeScaling) -> jax.Array:
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_context / wavelength  # full turns within the original context
    # From `low` turns to `high` turns the stretch fades from full to none. Scout's low == high
    # leaves no room to fade: a step, not a division by zero.
    span = scaling.high - scaling.low
    kept = jnp.clip((turns - scaling.low) / span, 0, 1) if span else turns >= scaling.high
    return frequency * (kept + (1 - kept) / scaling.factor)


def _yarn(frequency: jax.Array, scaling: Yarn, *, head_dim: int, theta: float) -> jax.Array:
    def pair(turns: float) -> float:
        """The pair, counted from 0, that turns so often within the original context."""
        ratio = scaling.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Without room to fade it is a step.
    span = high - low or 1e-3
    pairs = jnp.arange(head_dim // 2, dtype=jnp.float32)
    stretched = jnp.clip((pairs - low) / span, 0, 1)
    return frequency * (stretched / scaling.factor + (1 - stretched))

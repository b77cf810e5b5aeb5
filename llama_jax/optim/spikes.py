"""Updates are skipped whose loss is a spike: far above the running mean of the losses before."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

FIRST = 20
"""Losses that are seen before the first one can be a spike."""
LEAST_DEVIATIONS = 2.0
"""Standard deviations. By 1 and less the variance falls with each spike, and nothing is learnt
from again."""
_DECAY = 0.99
"""Of the running mean and variance: about the last 100 losses."""


class SpikeState(NamedTuple):
    mean: jax.Array
    variance: jax.Array
    seen: jax.Array
    """Losses, int32 []."""
    spikes: jax.Array
    """Updates that were skipped, int32 []."""
    inner: Any


def without_spikes(
    tx: optax.GradientTransformation, deviations: float
) -> optax.GradientTransformationExtraArgs:
    """`tx`, which moves nothing and keeps its state where the loss, given as `value`, is more than
    so many standard deviations above the running mean.

    A spike counts in mean and variance as a loss at that bound, so that a loss which stays high is
    learnt from again after some steps.
    """

    def init(params: Any) -> SpikeState:
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return SpikeState(zero, zero, none, none, tx.init(params))

    def update(
        grads: Any, state: SpikeState, params: Any = None, *, value: jax.Array, **_: Any
    ) -> tuple[Any, SpikeState]:
        bound = state.mean + deviations * jnp.sqrt(state.variance)
        spike = (state.seen >= FIRST) & (value > bound)
        directions, inner = tx.update(grads, state.inner, params)
        directions = jax.tree.map(lambda d: jnp.where(spike, 0.0, d), directions)
        inner = jax.tree.map(lambda new, old: jnp.where(spike, old, new), inner, state.inner)
        # Welford's, exponentially weighted; the plain mean and variance of the first losses.
        kept = jnp.minimum(_DECAY, state.seen / (state.seen + 1.0))
        off = jnp.where(spike, bound, value) - state.mean
        mean = state.mean + (1 - kept) * off
        variance = kept * (state.variance + (1 - kept) * off**2)
        return directions, SpikeState(mean, variance, state.seen + 1, state.spikes + spike, inner)

    return optax.GradientTransformationExtraArgs(init, update)

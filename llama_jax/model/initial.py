"""Initial values of weights."""

from __future__ import annotations

import math

import jax


def fan_in(key: jax.Array, shape: tuple[int, ...], n_inputs: int) -> jax.Array:
    """Normal with variance 1 / n_inputs, cut at two standard deviations, float32.

    For a projection back onto the residual stream `n_inputs` also counts the 2 L sub-layers that
    add to it, so that their sum keeps unit variance (Radford et al. 2019, section 2.3).
    """
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / math.sqrt(n_inputs)

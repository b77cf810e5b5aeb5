"""The average of the parameters over a run (Polyak & Juditsky 1992), as an exponential moving
average."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def averaged(average: Any, params: Any, *, decay: float, taken: jax.Array) -> Any:
    """The average with `params`, which are those after step `taken` + 1.

    Its decay is min(decay, (1 + taken) / (10 + taken)), so that a short run does not end with what
    it began with.
    """
    kept = jnp.minimum(decay, (1.0 + taken) / (10.0 + taken))
    return jax.tree.map(lambda a, p: a + (1.0 - kept) * (p - a), average, params)

"""Learning rates by width (muP); see model/width.py."""

from __future__ import annotations

from typing import Any

import jax
import optax

from llama_jax.model.tune import INPUTS
from llama_jax.model.width import Width
from llama_jax.trees import map_named


def by_width(
    tx: optax.GradientTransformation, width: Width, *, power: float
) -> optax.GradientTransformation:
    """`tx`, whose directions are scaled by `factor`; its state has the form that it had."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        directions, state = tx.update(updates, state, params)

        def scaled(path: str, d: jax.Array) -> jax.Array:
            return d * factor(path, width, power=power)

        return map_named(scaled, directions), state

    return optax.GradientTransformation(tx.init, update)


def factor(path: str, width: Width, *, power: float) -> float:
    """What the learning rate of the parameter at a dotted path is multiplied by. `power`: of 1 / m,
    for matrices of layers."""
    if path.rsplit('.', 2)[-2:] in (['norm', 'scale_D'], ['norm', 'bias_D']):  # before a head
        return width.out
    name = path.rsplit('.', 1)[-1]
    if name not in INPUTS:
        return 1.0
    return width.ratio**-power * (width.query if name == 'q_DNH' else 1.0)

"""Layer-wise learning rates: the nearer to the embedding, the smaller (Clark et al. 2020, ELECTRA,
appendix A.1; in the indexing of Bao et al. 2022, BEiT)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from llama_jax.model.layers import STACKS
from llama_jax.trees import map_named, named

_EMBEDDINGS = ('embed_VD', 'position_CD')


def by_depth(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`tx`, whose directions are scaled by `factors`; its state has the form that it had."""

    def update(
        updates: Any, state: optax.OptState, params: Any = None
    ) -> tuple[Any, optax.OptState]:
        directions, state = tx.update(updates, state, params)
        scale = factors(directions, decay)
        return map_named(lambda _, d, s: d * s, directions, scale), state

    return optax.GradientTransformation(tx.init, update)


def factors(params: Any, decay: float) -> Any:
    """What the learning rate of each parameter is multiplied by, float32 and of a shape that
    broadcasts to it.

    1 for the final norm, the head and what an objective adds; `decay` for the last layer, its
    square for the layer below, and so on; for the embeddings one power more than for the first
    layer, also where they are the head as well. Encoder and decoder each count from their own last
    layer, and share their embeddings.
    """
    depths = [x.shape[0] for path, x in named(params) if _stack(path)]
    below = max(depths, default=0) + 1

    def factor(path: str, x: Any) -> Any:
        if _stack(path):
            powers = jnp.arange(x.shape[0], 0, -1, dtype=jnp.float32)
            return jnp.reshape(decay**powers, (-1, *[1] * (x.ndim - 1)))
        return jnp.float32(decay**below if path.split('.')[0] in _EMBEDDINGS else 1.0)

    return map_named(factor, params)


def _stack(path: str) -> bool:
    return path.split('.')[0] in STACKS

"""muP (Yang et al. 2022, Tensor Programs V, table 8): what was tuned at one width holds at another.

Everything stands in initial values and learning rates, nothing in the forward pass, so that a
trained model is one like any other. By m = dim / base_dim:

| | initial values | learning rate |
|---|---|---|
| embeddings, head | those of base_dim | 1 |
| norm before the head | 1 / m | 1 / m |
| matrices of layers | 1 / sqrt(inputs), as ever | 1 / m; of Muon 1 / sqrt(m) |
| queries, besides | sqrt(base_head_dim / head_dim) | the same |
| other norms, biases | as ever | 1 |

That is for matrices whose both sides grow by m: the base has 1 / m of the heads, the heads of keys
and values, and the inner units of the feed-forward layers.

The norm stands for muP's multiplier of the logits, 1 / m, also where the head is the embedding; a
network of an objective that reads features as a layer does is given them times m. The queries stand
for its attention by 1 / head_dim in place of 1 / sqrt(head_dim). Where the optimizer does
not see the scale of gradients, a factor upon a parameter is the same factor upon its initial values
and its rate. Weight decay is that of the base at every width, as Mlodozeniec et al. have it (2025,
Completed Hyperparameter Transfer, 2512.22382); depth, batch and duration are not carried over.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig


def check(config: ModelConfig) -> None:
    """Raise UserError for heads that no base of whole heads grows to."""
    if not config.base_dim:
        return
    base_head_dim = config.base_head_dim or config.head_dim
    for name in ('heads', 'kv_heads'):
        n = getattr(config, name)
        if n * config.head_dim * config.base_dim % (config.dim * base_head_dim):
            raise UserError(
                f'model.base_dim {config.base_dim} carries rates over to model.dim {config.dim} '
                f'where heads grow as the width does, {config.dim / config.base_dim:g} times, and '
                f'model.{name} {n} is not so many times a whole number of heads of '
                f'{base_head_dim}: change --model.{name.replace("_", "-")}, or leave base_dim out'
            )


class Width(NamedTuple):
    """A model's width beside that of the base; without a base it is its own."""

    base: int
    """Width that embeddings and head are drawn for."""
    ratio: float = 1.0
    """m, above."""
    query: float = 1.0
    """What queries are multiplied by."""

    @property
    def out(self) -> float:
        """What the norm before the head is multiplied by."""
        return 1.0 / self.ratio


def width_of(config: ModelConfig) -> Width:
    """The width of a model."""
    if not config.base_dim:
        return Width(config.dim)
    heads = (config.base_head_dim or config.head_dim) / config.head_dim
    return Width(config.base_dim, config.dim / config.base_dim, math.sqrt(heads))

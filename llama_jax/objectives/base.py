"""What the loop asks of an objective. The loop knows no objective by name."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.transformer import Transformer

Batch = dict[str, Any]
"""Arrays [B, T] of one global batch: what `example` yields, and 'segments' and 'positions'."""


class Loss(NamedTuple):
    """Sums over a batch, or over one microbatch of it; only their totals are ever divided."""

    total: jax.Array
    """Weighted sum of what is minimised, float32 []."""
    weight: jax.Array
    """Sum of weights, float32 []: `total` / `weight` is the loss."""
    metrics: dict[str, jax.Array]
    """Further weighted sums, float32 []; the loop divides each by `weight`. 'nll' where the
    objective has a likelihood: negative log-likelihood in nats."""


class Objective(Protocol):
    """A frozen dataclass with pure functions."""

    @property
    def splittable(self) -> bool:
        """Whether an example may be cut at any token and go on in the next row."""
        ...

    def example(
        self, tokens: np.ndarray, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Examples made of one document (host, numpy): equal-length arrays [n] by name.

        `tokenizer` gives the ids of control tokens; all chance comes from `rng`.
        """
        ...

    def loss(
        self, model: Transformer, batch: Batch, *, compute: Compute, key: jax.Array | None
    ) -> Loss:
        """Loss sums of a batch (device). Without a key there is no dropout."""
        ...

    def loss_tokens(self, batch: Batch) -> int:
        """Tokens of a batch that bear loss (host)."""
        ...

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Model FLOPs per position of a row for forward and backward, attention counted causally
        where it is causal."""
        ...

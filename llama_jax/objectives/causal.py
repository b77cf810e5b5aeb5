"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.base import Base, Batch, Loss
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.softmax import cross_entropy


@dataclass(frozen=True)
class CausalLM(Base):
    """Maximum likelihood of every token of a document and of its end (Radford et al. 2018)."""

    z_loss: float = 1e-4
    """Weight of log(Z)^2, which keeps the softmax's partition function near one."""

    @property
    def splittable(self) -> bool:
        return True

    @property
    def has_likelihood(self) -> bool:
        return True

    def example(
        self, tokens: np.ndarray, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """The document after a begin token, and its tokens and an end token to predict."""
        ids = np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
        weights = np.ones(len(ids) - 1, np.float32)
        return [{'inputs': ids[:-1], 'targets': ids[1:], 'weights': weights}]

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        *,
        extra: Params,
        compute: Compute,
        key: jax.Array | None,
    ) -> Loss:
        x_BTD, _ = model.features(
            batch['inputs'],
            position_BT=batch['positions'],
            segment_BT=batch['segments'],
            compute=compute,
            key=key,
        )
        sums = cross_entropy(
            x_BTD, model.head()[...], batch['targets'], batch['weights'], self.z_loss
        )
        return Loss(
            total=sums.total,
            weight=batch['weights'].sum(),
            metrics={'nll': sums.nll, 'accuracy': sums.correct},
        )

    def loss_tokens(self, batch: Batch) -> int:
        return int(np.count_nonzero(batch['weights']))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return decoder_flops(model, seq_len, causal=True)

"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.model.config import ModelConfig
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.prediction import TokenPrediction, check_architecture


@dataclass(frozen=True)
class CausalLM(TokenPrediction):
    """Maximum likelihood of every token of a document and of its end (Radford et al. 2018)."""

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

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return decoder_flops(model, seq_len, causal=True)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'causal language modelling', encoder=False)

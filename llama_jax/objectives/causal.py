"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.asked import LEFT_TO_RIGHT, Reading
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.prediction import TokenPrediction, check_architecture, predicted


@dataclass(frozen=True)
class CausalLM(TokenPrediction):
    """Maximum likelihood of every token of a document and of its end (Radford et al. 2018)."""

    in_order: ClassVar[bool] = True

    @property
    def ends(self) -> bool:
        return True

    @property
    def has_likelihood(self) -> bool:
        return True

    @property
    def reading(self) -> Reading:
        return LEFT_TO_RIGHT

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return (n,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """What stands before each unit of the piece, and the unit to predict."""
        return predicted(*piece.predicted(tokenizer))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return decoder_flops(model, seq_len, causal=True)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'causal language modelling', encoder=False)

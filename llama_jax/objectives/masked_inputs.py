"""Masked inputs in a causal model: every next token is predicted, from a text with gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.data.pieces import Example, Piece
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.prediction import check_architecture, predicted


@dataclass(frozen=True)
class MaskedInputs(CausalLM):
    """Causal language modelling in which some inputs are <mask> (MEAP, Zhuang et al. 2025, section
    3). Loss is on all targets, those of masked inputs among them. The begin token stays.

    Its own loss is no likelihood of the text, for it is of one with gaps; the trained model is
    asked without any, as a causal one.
    """

    rate: float = 0.15
    """Share of the inputs that are masked, drawn anew for each example; one at least."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(
                f'--objective.rate is {self.rate}: the share of masked inputs is between 0 and 1'
            )

    @property
    def marks(self) -> bool:
        return True

    @property
    def has_likelihood(self) -> bool:
        return False

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        inputs, targets = piece.predicted(tokenizer)
        first = 0 if piece.start else 1
        n = len(inputs) - first
        if n:
            place = first + rng.choice(n, max(1, round(self.rate * n)), replace=False)
            inputs = inputs.copy()
            inputs[place] = tokenizer.mask_id
        return predicted(inputs, targets)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'causal language modelling with masked inputs', encoder=False)

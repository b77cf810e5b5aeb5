"""Deshuffling: the tokens of a text in random order -> the text (Raffel et al. 2020, section
3.3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.asked import NOTHING, Reading
from llama_jax.objectives.flops import encoder_decoder_flops, prefix_flops
from llama_jax.objectives.prediction import (
    ENCODER,
    TokenPrediction,
    check_architecture,
    denoising,
)


@dataclass(frozen=True)
class Deshuffling(TokenPrediction):
    """Likelihood of a text and of its end, given its tokens in an order that is as likely as any
    other."""

    encoder: bool = False
    """Inputs to the encoder of an encoder-decoder. False: inputs and targets in one stream, the
    inputs in full view."""

    @property
    def causal(self) -> bool:
        return False

    @property
    def reading(self) -> Reading:
        return NOTHING._replace(text=False, begins=self.encoder)  # it writes what it was given

    def lengths(self, seq_len: int) -> dict[str, int]:
        """Half of the row for the inputs."""
        if seq_len < 3:
            raise UserError(
                f'a row of {seq_len} positions has no room for a text and its copy: raise the '
                'sequence length'
            )
        half = seq_len // 2
        return {ENCODER: half, '': seq_len - half} if self.encoder else {'': seq_len}

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        """The targets have an end token besides."""
        return (n, n + 1) if self.encoder else (2 * n + 1,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        text = piece.text
        if not len(text):
            return None  # of an end alone there is nothing to learn
        targets = np.append(text, tokenizer.eos_id)
        return denoising(rng.permutation(text), targets, tokenizer=tokenizer, encoder=self.encoder)

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of a row that one text fills."""
        half = seq_len // 2
        if self.encoder:
            return encoder_decoder_flops(model, half, seq_len - half)
        return prefix_flops(model, seq_len, prefix=half, predicted=seq_len - half)

    def check(self, model: ModelConfig) -> None:
        name = f'deshuffling with encoder={self.encoder}'
        check_architecture(model, name, encoder=self.encoder)

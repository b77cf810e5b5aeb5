"""Prefix language modelling: the first part of a text in full view, the rest predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.asked import Middle, Reading, asking
from llama_jax.objectives.flops import prefix_flops
from llama_jax.objectives.prediction import TokenPrediction, check_architecture


@dataclass(frozen=True)
class PrefixLM(TokenPrediction):
    """Likelihood of a suffix given its prefix (Raffel et al. 2020, section 3.2.3).

    Every piece of a document, of L inputs, is split. The split is uniform in [1, L), so that every
    suffix has two tokens or more; a piece of one input has split 1, which is the causal form.
    """

    ratio: float | None = None
    """Share of a piece that is prefix, in [0, 1). None: drawn for every piece."""

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UserError(
                f'--objective.ratio {self.ratio}: the share of the prefix must be in [0, 1)'
            )

    @property
    def causal(self) -> bool:
        return False

    @property
    def ends(self) -> bool:
        return True

    @property
    def reading(self) -> Reading:
        seen = asking('exact', in_full_view)
        return Reading(rest=seen, middle=seen)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return (n,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The causal example, with the first inputs in full view and weight on the rest."""
        inputs, targets = piece.predicted(tokenizer)
        return split_at(inputs, targets, self.split(len(inputs), rng))

    def split(self, length: int, rng: np.random.Generator) -> int:
        """How many of `length` inputs are prefix."""
        if self.ratio is None:
            return int(rng.integers(1, max(length, 2)))
        return prefix_of(length, self.ratio)

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of a row that one piece fills; the mean over splits where they are drawn."""
        if self.ratio is not None:
            return _flops(model, seq_len, split=prefix_of(seq_len, self.ratio))
        # All splits of a short row, and as many of a long one as give the mean within a thousandth.
        n = max(1, min(seq_len - 1, 64))
        splits = [1 + int((i + 0.5) / n * (seq_len - 1)) for i in range(n)]
        return sum(_flops(model, seq_len, split=split) for split in splits) / n

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'prefix language modelling', encoder=False)


def prefix_of(length: int, ratio: float) -> int:
    """How many of `length` inputs are prefix where that is a share of them."""
    return min(round(ratio * length), length - 1)


def in_full_view(text: Middle, tokenizer: Any) -> Example:
    """[begin, prefix] in full view, the middle after it."""
    ids = np.concatenate([[tokenizer.bos_id], text.prefix, text.middle]).astype(np.int32)
    return split_at(ids[:-1], ids[1:], 1 + len(text.prefix))


def _flops(model: ModelConfig, seq_len: int, *, split: int) -> float:
    """The last position of the prefix is the first that is read."""
    return prefix_flops(model, seq_len, prefix=split, predicted=min(seq_len - split + 1, seq_len))


def split_at(inputs: np.ndarray, targets: np.ndarray, split: int) -> Example:
    """Example whose first `split` inputs are in full view.

    Weight begins at the last of them, for its target is the first token that the prefix lacks.
    """
    position = np.arange(len(inputs))
    return {
        'inputs': inputs,
        'targets': targets,
        'weights': (position >= split - 1).astype(np.float32),
        'prefix': (position < split).astype(np.int32),
    }

"""Masked language modelling: tokens hidden and told from all of the text around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.asked import Infill, Middle, Question, Reading, weighted_at
from llama_jax.objectives.base import after_begin
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.prediction import TokenPrediction, check_architecture

MASKED, RANDOM = 0.8, 0.1
"""Shares of the selected tokens that are hidden, and that another token stands in for."""


@dataclass(frozen=True)
class MaskedLM(TokenPrediction):
    """The original token where one was selected (BERT, Devlin et al. 2019, section 3.1).

    Of the selected, 80% become <mask>, 10% a random ordinary token, and 10% stay as they are. A
    begin token stands before each piece of the document, and is never selected.
    """

    rate: float = 0.15
    """Share of the tokens that are selected; one at least."""
    read_previous: bool = False
    """A token is read off the position before it, as a causal model has learnt to do (MNTP,
    BehnamGhader et al. 2024, section 2.1)."""

    sees_all: ClassVar[bool] = True

    @property
    def marks(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise UserError(
                f'--objective.rate {self.rate}: the share of masked tokens must be in (0, 1]'
            )

    @property
    def causal(self) -> bool:
        return False

    @property
    def reading(self) -> Reading:
        return Reading(
            middle=Question('pseudo', self._one_by_one, sees_all=True),
            infill=Infill(self._hidden, ends='length', sees_all=True),
            text=False,
        )

    def lengths(self, seq_len: int) -> dict[str, int]:
        return after_begin(seq_len)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return (n + 1,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The piece after a begin token, with some tokens hidden."""
        text = piece.text
        if not len(text):
            return None
        selected = np.zeros(len(text), bool)
        selected[rng.choice(len(text), self.selected(len(text)), replace=False)] = True
        hidden = hide(text, selected, tokenizer=tokenizer, rng=rng)
        if self.read_previous:
            targets, weights = np.append(text, tokenizer.pad_id), np.append(selected, 0)
        else:
            targets, weights = np.append(tokenizer.bos_id, text), np.append(0, selected)
        return {
            'inputs': np.concatenate([[tokenizer.bos_id], hidden]).astype(np.int32),
            'targets': targets.astype(np.int32),
            'weights': weights.astype(np.float32),
        }

    def _hidden(self, text: Middle, tokenizer: Any) -> Example:
        """A <mask> for every token of the middle."""
        ids = np.concatenate([[tokenizer.bos_id], *text]).astype(np.int32)
        start, n = 1 + len(text.prefix), len(text.middle)
        inputs = ids.copy()
        inputs[start : start + n] = tokenizer.mask_id
        if self.read_previous:
            return weighted_at(inputs, np.append(ids[1:], tokenizer.pad_id), start=start - 1, n=n)
        return weighted_at(inputs, ids, start=start, n=n)

    def _one_by_one(self, text: Middle, tokenizer: Any, rng: np.random.Generator) -> list[Example]:
        """An example for each token of the middle, in which it alone is masked (Salazar et al.
        2020, equation 1)."""
        before, middle, behind = text
        return [
            self._hidden(
                Middle(
                    np.concatenate([before, middle[:j]]),
                    middle[j : j + 1],
                    np.concatenate([middle[j + 1 :], behind]),
                ),
                tokenizer,
            )
            for j in range(len(middle))
        ]

    def selected(self, n: int) -> int:
        """How many of `n` tokens are selected."""
        return max(1, round(self.rate * n))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of a row that one text fills."""
        predicted = self.predicts(seq_len)
        whole = decoder_flops(model, seq_len, causal=False, predicted=predicted)
        return whole - self.skipped_flops(model, seq_len)

    def predicts(self, seq_len: int) -> int:
        return self.selected(seq_len - 1)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'masked language modelling', encoder=False)


def hide(
    tokens: np.ndarray, selected: np.ndarray, *, tokenizer: Any, rng: np.random.Generator
) -> np.ndarray:
    """The tokens with the selected ones hidden 80/10/10."""
    shown = tokens.copy()
    place = np.flatnonzero(selected)
    chance = rng.random(len(place))
    shown[place[chance < MASKED]] = tokenizer.mask_id
    other = place[(chance >= MASKED) & (chance < MASKED + RANDOM)]
    shown[other] = ordinary(len(other), byte_lengths=tokenizer.byte_lengths, rng=rng)
    return shown


def ordinary(n: int, *, byte_lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`n` ids of tokens that stand for text, each as likely as another.

    Control tokens are drawn again: a list of all others would take longer than the example.
    """
    ids = rng.integers(len(byte_lengths), size=n)
    while (control := byte_lengths[ids] == 0).any():
        ids[control] = rng.integers(len(byte_lengths), size=int(control.sum()))
    return ids

"""The dual objective (Samuel and Charpentier 2025, 2512.14549): causal and masked diffusion in one
model, each for a share of the texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.pieces import Example, Piece
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.asked import LEFT_TO_RIGHT, Reading
from llama_jax.objectives.base import ALONE, Batch, Context, Loss
from llama_jax.objectives.diffusion import MaskedDiffusion
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.softmax import cross_entropy


@dataclass(frozen=True)
class Dual(MaskedDiffusion):
    """Each text is either causal, which is weighted by `causal_weight`, or masked as in masked
    diffusion and seen whole. Both are read off the position before the token, so that they share
    head and positions.

    The trained model is asked for likelihood and for text as a causal one, and for what stands
    between two sides as a masked one.
    """

    read_previous: bool = True
    causal_share: float = 0.5
    """Of the texts."""
    causal_weight: float = 2.0
    """Of the loss of a causal token beside masked texts, whose tokens are learnt half of the time;
    1 in a curriculum, whose steps are of one kind."""
    curriculum_steps: int = 0
    """Steps of the run, where not texts but steps are shared out: in the first `causal_share` of
    them every text is causal, in the others none (Gisserot-Boukhlef et al. 2025). The trained model
    is then masked diffusion, and is validated and asked as such. 0: texts."""

    sees_all: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.causal_share < 1:
            raise UserError(
                f'--objective.causal-share {self.causal_share} leaves one of the two without any '
                'text: give a share in (0, 1), or take causal or masked diffusion alone'
            )
        if self.causal_weight <= 0:
            raise UserError(f'--objective.causal-weight {self.causal_weight}: it must be positive')
        if self.curriculum_steps and self.causal_weight != Dual.causal_weight:
            raise UserError(
                f'--objective.causal-weight {self.causal_weight} has no effect beside '
                '--objective.curriculum-steps, where a step has texts of one kind: leave it out'
            )
        if self.curriculum_steps < 0:
            raise UserError(
                f'--objective.curriculum-steps is {self.curriculum_steps}: give the steps of the '
                'run, or 0 for texts of both kinds in every step'
            )
        if not self.read_previous:
            raise UserError('causal texts are read off the position before: leave read_previous')

    @property
    def has_likelihood(self) -> bool:
        """After a curriculum that of masked diffusion; else its loss is of two kinds of texts."""
        return self.curriculum_steps > 0

    @property
    def reading(self) -> Reading:
        masked = MaskedDiffusion(read_previous=True).reading
        if self.curriculum_steps:
            return masked
        return LEFT_TO_RIGHT._replace(
            middle=masked.middle, infill=masked.infill, unmasks=masked.unmasks
        )

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """That of masked diffusion; 'prefix' says that the text is masked and seen whole."""
        example = super().example(piece, tokenizer=tokenizer, seq_len=seq_len, rng=rng)
        assert example is not None
        masked = int(piece.draw >= self.causal_share)
        example['prefix'] = np.full(len(example['inputs']), masked, np.int32)
        return example

    def tokens(self, batch: Batch) -> jax.Array:
        return super().tokens(batch) & (batch['prefix'] > 0)

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        *,
        extra: Params,
        compute: Compute,
        key: jax.Array | None,
        context: Context = ALONE,
    ) -> Loss:
        """Per token of any text; the negative log-likelihoods each per token of its own kind."""
        if self.curriculum_steps:
            batch = {**batch, 'prefix': self._of_step(batch, context)}
        masks, key = self.masks(batch, key)
        shown = {**batch, 'inputs': jnp.where(masks.masked_BT, batch['hidden'], batch['inputs'])}
        x_BTD = self.read(model, shown, compute=compute, key=key)
        is_causal_BT = batch['prefix'] == 0
        how = (self.z_loss, model.config.vocab_padding)
        head, targets = model.head()[...], batch['targets']
        # The mask has to learn that no causal text goes on with it; in a masked one it cannot.
        causal = cross_entropy(x_BTD, head, targets, batch['weights'] * is_causal_BT, *how)
        weight_BT, never_BT = (jnp.roll(x, -1, 1) for x in (masks.weight_BT, batch['hidden']))
        masked = cross_entropy(x_BTD, head, targets, weight_BT, *how, never_BT)
        tokens = batch['weights'].sum()
        n_causal = jnp.sum(batch['weights'] * is_causal_BT)
        n_masked = tokens - n_causal
        weight = 1.0 if self.curriculum_steps else self.causal_weight
        both = {'nll': causal.nll + masked.nll} if self.has_likelihood else {}
        return Loss(
            total=weight * causal.total + masked.total,
            weight=tokens,
            metrics={
                **both,
                'causal_nll': causal.nll,
                'causal_accuracy': causal.correct,
                'masked_nll': masked.nll,
                'masked_accuracy': masked.correct,
            },
            weights={
                'causal_nll': n_causal,
                'causal_accuracy': n_causal,
                'masked_nll': n_masked,
                'masked_accuracy': n_masked,
            },
        )

    def stretched(self, ratio: float) -> Dual:
        if not self.curriculum_steps:
            return self
        return replace(self, curriculum_steps=max(1, round(self.curriculum_steps * ratio)))

    def check_steps(self, steps: int) -> None:
        first = math.ceil(self.causal_share * self.curriculum_steps)
        if first >= steps:
            raise UserError(
                f'masked texts begin at step {first}, and the run has {steps}: lower '
                '--objective.curriculum-steps or raise --train.steps'
            )

    def _of_step(self, batch: Batch, context: Context) -> jax.Array:
        """'prefix' of a step of the curriculum; a validation is one of its end."""
        text_BT = (batch['segments'] > 0).astype(batch['prefix'].dtype)
        if context.step is None:
            return text_BT
        return text_BT * (context.step >= self.causal_share * self.curriculum_steps)

    def loss_tokens(self, batch: Batch) -> int:
        """All of a causal text, and half of a masked one on average."""
        masked = {**batch, 'weights': batch['weights'] * batch['prefix']}
        masked['positions'] = np.where(batch['prefix'] > 0, batch['positions'], 0)
        units = int(np.count_nonzero(batch['weights'] * (batch['prefix'] == 0)))
        return units + super().loss_tokens(masked)

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Mean over the two kinds, of rows that one text fills."""
        return self._flops(model, seq_len, self.causal_share)

    def flops_of_run(self, model: ModelConfig, seq_len: int, steps: int) -> float:
        if not self.curriculum_steps or not steps:
            return self.flops(model, seq_len)
        first = math.ceil(self.causal_share * self.curriculum_steps)
        return self._flops(model, seq_len, min(1.0, first / steps))

    def _flops(self, model: ModelConfig, seq_len: int, share: float) -> float:
        causal = decoder_flops(model, seq_len, causal=True, predicted=seq_len - 1)
        return share * causal + (1 - share) * super().flops(model, seq_len)

"""Multi-token prediction: each position predicts several coming tokens, by a head for each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from llama_jax.errors import UserError
from llama_jax.model import heads
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import HEADS, Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.base import ALONE, Batch, Context, Loss, Objective
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.flops import TRAINING, decoder_flops, head, layer, mean_keys
from llama_jax.objectives.prediction import check_architecture
from llama_jax.objectives.softmax import cross_entropies

MOST = 16
"""Heads: speculative decoding drafts so many tokens but one at a time."""


@dataclass(frozen=True)
class MultiToken(CausalLM):
    """Sum over heads j of decay^(j - 1) times the loss of the j-th token ahead (Gloeckle et al.
    2024, section 2). Head 1 is the model, which is causal; each other head is one more layer, which
    reads what the last layer reads, and shares the final norm and the output head.

    No head looks across the end of a piece: the last targets of a document, which farther heads do
    not have, are left out of their sums. All sums are divided by the weight of head 1.
    """

    heads: int = 4
    """Tokens that are predicted at a position. For as many parameters as a causal model has, take
    `heads` - 1 layers from the model."""
    decay: float = 1.0
    """Each head's loss counts so many times as much as that of the head before."""
    curriculum: Literal['none', 'forward', 'reverse'] = 'none'
    """How many heads are trained at a time (Aynetdinov & Akbik 2025): forward begins with head 1
    alone and ends with all, reverse the other way round, in `heads` equal parts of
    `curriculum_steps`. A head that is not trained costs time all the same. Validation asks all."""
    curriculum_steps: int = 0
    """Steps of the whole curriculum, such as those of the run."""

    def __post_init__(self) -> None:
        if not 1 <= self.heads <= MOST:
            raise UserError(f'--objective.heads {self.heads}: predict 1 to {MOST} tokens')
        if not 0 < self.decay <= 1:
            raise UserError(f'--objective.decay is {self.decay}: it is above 0 and at most 1')
        if self.heads == 1 and (self.decay != 1 or self.curriculum != 'none'):
            raise UserError(
                '--objective.heads 1 has no other heads to weigh: leave decay and curriculum out'
            )
        if (self.curriculum == 'none') != (self.curriculum_steps == 0) or self.curriculum_steps < 0:
            raise UserError(
                f'--objective.curriculum {self.curriculum} over --objective.curriculum-steps '
                f'{self.curriculum_steps}: give forward or reverse and its steps, or neither'
            )

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        return {HEADS: heads.create(model, self.heads, key)} if self.heads > 1 else {}

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
        beside = heads.bind(model.config, extra[HEADS]) if self.heads > 1 else []
        x_JBTD, _ = model.features(
            batch['inputs'],
            position_BT=batch['positions'],
            segment_BT=batch['segments'],
            compute=compute,
            key=key,
            beside=beside,
        )
        targets = [ahead(batch, j) for j in range(self.heads)]
        target_JBT, weight_JBT = map(jnp.stack, zip(*targets, strict=True))
        total, sums = cross_entropies(
            *(x_JBTD if beside else x_JBTD[None], model.head()[...], target_JBT, weight_JBT),
            *(self.scales(context.step), self.z_loss, model.config.vocab_padding),
        )
        weight_J = weight_JBT.sum(axis=(1, 2))
        metrics = {'nll': sums.nll[0], 'accuracy': sums.correct[0]}
        weights: dict[str, jax.Array] = {}
        for j in range(1, self.heads):  # of each head over its own targets
            own = {f'nll_{j + 1}': sums.nll[j], f'accuracy_{j + 1}': sums.correct[j]}
            metrics |= own
            weights |= dict.fromkeys(own, weight_J[j])
        return Loss(total, weight_J[0], metrics, weights=weights)

    def scales(self, step: jax.Array | None) -> jax.Array:
        """What each head's loss counts [heads], after so many steps; None: outside of training."""
        number_J = jnp.arange(self.heads)
        scale_J = jnp.float32(self.decay) ** number_J
        if step is None or self.curriculum == 'none':
            return scale_J
        stage = jnp.minimum(step * self.heads // self.curriculum_steps, self.heads - 1)
        last = stage if self.curriculum == 'forward' else self.heads - 1 - stage
        return jnp.where(number_J <= last, scale_J, 0)

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """The model's, and for each other head one more layer and one more product with the output
        head; under a curriculum too, for so it is computed."""
        each = layer(model, mean_keys(model, seq_len, causal=True)) + head(model)
        return decoder_flops(model, seq_len, causal=True) + TRAINING * (self.heads - 1) * each

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'multi-token prediction', encoder=False)

    def stretched(self, ratio: float) -> MultiToken:
        if self.curriculum == 'none':
            return self
        return replace(self, curriculum_steps=max(1, round(self.curriculum_steps * ratio)))

    def check_steps(self, steps: int) -> None:
        if self.curriculum == 'none':
            return
        first = math.ceil((self.heads - 1) * self.curriculum_steps / self.heads)
        if first >= steps:
            forward = self.curriculum == 'forward'
            what = f'head {self.heads} is trained' if forward else 'the first head is trained alone'
            raise UserError(
                f'{what} from step {first} on, and the run has {steps}: '
                'lower --objective.curriculum-steps or raise --train.steps'
            )


def where_heads_are(objective: Objective, run: str) -> tuple[str, ...]:
    """Keys of `extra` under which a trained objective, or the first part of a sum that has any,
    keeps its heads. Raises UserError where there are none; `run` is what it is called."""
    parts = getattr(objective, 'parts', None)
    for k, part in enumerate((objective,) if parts is None else parts):
        if isinstance(part, MultiToken) and part.heads > 1:
            return (HEADS,) if parts is None else (str(k), HEADS)
    raise UserError(
        f'--draft heads: {run} was not trained with heads that draft; --objective multi-token '
        'trains them, and --lookup N drafts without any'
    )


def ahead(batch: Batch, n: int) -> tuple[jax.Array, jax.Array]:
    """Targets and weights [B, T] of what stands `n` places after each target, in its segment."""

    def moved(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT[:, n:], ((0, 0), (0, n)))

    same_BT = moved(batch['segments']) == batch['segments']
    return moved(batch['targets']), jnp.where(same_BT, moved(batch['weights']), 0)

"""A reward model: a number for an answer to a prompt, learnt from which of two is better (Bradley
and Terry 1952; Ouyang et al. 2022, section 3.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llama_jax.data.pieces import Example, Piece
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.model.width import width_of
from llama_jax.objectives.base import ALONE, Batch, Context, Loss
from llama_jax.objectives.flops import TRAINING, features_flops
from llama_jax.objectives.pairs import CHOSEN, Pairs, both, by_pair, facts, features, summed

MARGIN = 'margin'
"""The array with how much better the chosen answer is."""


@dataclass(frozen=True)
class RewardModel(Pairs):
    """-log sigmoid(r(chosen) - r(rejected) - margin), the margin being that of the record (Llama 2,
    section 3.2.2) or 0. Weight is one per pair.

    The reward is a linear function of the features of the last token of the answer, the end of its
    turn, which the model reads as well. It has no constant, of which the loss would say nothing.
    """

    predicts: ClassVar[bool] = False

    def arrays(self, ids: np.ndarray, weights: np.ndarray) -> Example:
        """Inputs, and weight on the token where the reward is read."""
        last = np.zeros(len(ids), np.float32)
        last[-1] = 1
        return {'inputs': ids, 'weights': last}

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        example = super().example(piece, tokenizer=tokenizer, seq_len=seq_len, rng=rng)
        if example is not None and piece.encoded is not None:
            n = len(example[f'{CHOSEN}/inputs'])
            example[f'{CHOSEN}/{MARGIN}'] = np.full(n, piece.encoded.number, np.float32)
        return example

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        return {'head_D': fan_in(key, (model.dim,), width_of(model).base)}

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
        reward_BT = rewards(features(model, batch, compute=compute, key=key), extra)
        chosen_BM, rejected_BM = by_pair(reward_BT * both(batch, 'weights'), batch)
        better_BM = chosen_BM - rejected_BM
        each_BM = -jax.nn.log_sigmoid(better_BM - facts(batch, f'{CHOSEN}/{MARGIN}'))
        metrics_BM = {
            'accuracy': better_BM > 0,
            'margin': better_BM,
            'reward_chosen': chosen_BM,
            'reward_rejected': rejected_BM,
        }
        return summed(each_BM, metrics_BM, batch)

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return features_flops(model, seq_len // 2, causal=True) + TRAINING * model.dim


def rewards(x_BTD: Float[Array, 'B T D'], extra: Params) -> Float[Array, 'B T']:
    """The reward of what ends at each token, float32."""
    # Not a product of matrices, which some devices would round to bfloat16.
    return jnp.sum(x_BTD.astype(jnp.float32) * extra['head_D'], axis=-1)

"""Direct preference optimisation: the better of two answers becomes more likely than the worse one
(DPO, Rafailov et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.pieces import Encoded, Example, Piece
from llama_jax.data.record import BadRecordError
from llama_jax.errors import UserError
from llama_jax.model.adapted import adapters_off
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.base import ALONE, Batch, Context, Loss
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.log_probs import log_probs
from llama_jax.objectives.pairs import (
    CHOSEN,
    REJECTED,
    STREAMS,
    Pairs,
    both,
    by_pair,
    facts,
    features,
    summed,
)
from llama_jax.text.chat import ChatFormat, end_ids
from llama_jax.text.vocabulary import Vocabulary

REFERENCE = 'reference'
"""The array with the log-probability of a whole answer under the reference model."""


@dataclass(frozen=True)
class DPO(Pairs):
    """-log sigmoid(beta D) with D = (log p(chosen) - log ref(chosen)) - (log p(rejected) - log
    ref(rejected)), log-probabilities summed over the tokens of an answer. Weight is one per pair:
    the loss is the mean over the pairs of the global batch, ln 2 where the model is its reference.
    """

    beta: float = 0.1
    """How much a difference in log-probability counts: the larger it is, the nearer the model stays
    to its reference."""
    loss_type: Literal['sigmoid', 'ipo'] = 'sigmoid'
    """'ipo': (D - 1 / (2 beta))^2 with log-probabilities averaged over tokens, which has an end:
    the margin stops growing (Azar et al. 2023, equation 17)."""
    smoothing: float = 0.0
    """Share e of pairs that are taken to be labelled the wrong way: -(1 - e) log sigmoid(beta D) -
    e log sigmoid(-beta D), the conservative form (Mitchell 2023)."""
    nll: float = 0.0
    """Weight of the negative log-likelihood of the chosen answer per token, which is added so that
    it does not become unlikely as well (Llama 3, section 4.1.4: 0.2)."""
    mask_format: bool = False
    """The control tokens of both answers, such as the end of the turn, bear no loss (same section:
    else the model learns to end too early or never)."""
    reference: Literal['start', 'adapters_off'] = 'start'
    """'start': log-probabilities of all pairs under the parameters that the run begins with, which
    are computed before the first step and kept in the workdir. 'adapters_off': the model without
    its adapters, in each step."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise UserError(f'--objective.beta is {self.beta}: it must be positive')
        if not 0 <= self.smoothing < 0.5:
            raise UserError(
                f'--objective.smoothing is {self.smoothing}: it is a share of wrong labels, 0 or '
                'more and below 0.5'
            )
        if not (self.nll >= 0 and math.isfinite(self.nll)):
            raise UserError(f'--objective.nll is {self.nll}: it must be 0 or more')
        if self.loss_type == 'ipo' and self.smoothing:
            raise UserError(
                f'--objective.smoothing {self.smoothing} has no effect with --objective.loss-type '
                'ipo: leave it out'
            )

    @property
    def encoding(self) -> tuple[Any, ...]:
        return (self.mask_format,)

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        if record.margin:
            raise BadRecordError(
                f'a margin of {record.margin:g}, of which DPO makes no use: leave it out, or train '
                'a RewardModel'
            )
        encoded = super().encoded(record, vocabulary=vocabulary, chat=chat)
        if not self.mask_format:
            return encoded
        format_ids = [*vocabulary.control.values(), *end_ids(chat, vocabulary)]
        weights = tuple(
            np.where(np.isin(ids, format_ids), np.float32(0), weight)
            for ids, weight in zip(encoded.parts, encoded.weights, strict=True)
        )
        for name, weight in zip(STREAMS, weights, strict=True):
            if not weight.any():
                raise BadRecordError(f'{name} has no token but those of the format')
        return encoded._replace(weights=weights)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        example = super().example(piece, tokenizer=tokenizer, seq_len=seq_len, rng=rng)
        if example is None or piece.given is None:
            return example
        for stream, value in zip(STREAMS, piece.given, strict=True):
            n = len(example[f'{stream}/inputs'])
            example[f'{stream}/{REFERENCE}'] = np.full(n, value, np.float32)
        return example

    @property
    def knows(self) -> bool:
        return self.reference == 'start'

    def know(self, model: Transformer, batch: Batch, *, compute: Compute) -> jax.Array:
        """Log-probabilities of the chosen and of the rejected answer of each pair."""
        return jnp.stack(answer_log_probs(model, batch, compute=compute, key=None), axis=-1)

    @property
    def needs_adapters(self) -> bool:
        return self.reference == 'adapters_off'

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
        chosen_BM, rejected_BM = answer_log_probs(model, batch, compute=compute, key=key)
        ref_chosen_BM, ref_rejected_BM = self._reference(model, batch, compute)
        n_chosen_BM, n_rejected_BM = by_pair(
            (both(batch, 'weights') > 0).astype(jnp.float32), batch
        )
        gain_BM, loss_BM = chosen_BM - ref_chosen_BM, rejected_BM - ref_rejected_BM
        n_chosen_BM, n_rejected_BM = jnp.maximum(n_chosen_BM, 1), jnp.maximum(n_rejected_BM, 1)
        if self.loss_type == 'ipo':
            margin_BM = gain_BM / n_chosen_BM - loss_BM / n_rejected_BM
            each_BM = jnp.square(margin_BM - 1 / (2 * self.beta))
        else:
            logit_BM = self.beta * (gain_BM - loss_BM)
            each_BM = -(1 - self.smoothing) * jax.nn.log_sigmoid(logit_BM)
            each_BM -= self.smoothing * jax.nn.log_sigmoid(-logit_BM)
        nll_BM = -chosen_BM / n_chosen_BM
        if self.nll:
            each_BM += self.nll * nll_BM
        metrics_BM = {
            'accuracy': gain_BM > loss_BM,
            'margin': self.beta * (gain_BM - loss_BM),
            'reward_chosen': self.beta * gain_BM,
            'reward_rejected': self.beta * loss_BM,
            'log_prob_chosen': chosen_BM,
            'log_prob_rejected': rejected_BM,
            'nll_chosen': nll_BM,
        }
        return summed(each_BM, metrics_BM, batch)

    def _reference(
        self, model: Transformer, batch: Batch, compute: Compute
    ) -> tuple[jax.Array, jax.Array]:
        if self.reference == 'adapters_off':
            # Without dropout, as a reference that is computed before.
            known = answer_log_probs(adapters_off(model), batch, compute=compute, key=None)
            return jax.lax.stop_gradient(known)
        if f'{CHOSEN}/{REFERENCE}' not in batch:
            raise UserError(
                'the log-probabilities under the reference are not known here: only a run, which '
                'computes them before its first step, has the loss of DPO'
            )
        return facts(batch, f'{CHOSEN}/{REFERENCE}'), facts(batch, f'{REJECTED}/{REFERENCE}')

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        trained = decoder_flops(model, seq_len // 2, causal=True)
        return trained * (4 / 3 if self.reference == 'adapters_off' else 1)


def answer_log_probs(
    model: Transformer, batch: Batch, *, compute: Compute, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the chosen and of the rejected answers, given their prompts, summed over
    the tokens that bear loss: [B, M] each, in nats."""
    x_BTD = features(model, batch, compute=compute, key=key)
    log_p_BT = log_probs(
        x_BTD, model.head()[...], both(batch, 'targets'), model.config.vocab_padding
    )
    return by_pair(jnp.where(both(batch, 'weights') > 0, log_p_BT, 0), batch)

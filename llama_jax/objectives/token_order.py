"""Token-order prediction: beside the next token, how soon each token comes."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.base import ALONE, Batch, Context, Loss
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.flops import TRAINING, decoder_flops, head
from llama_jax.objectives.prediction import check_architecture
from llama_jax.objectives.rank import rank_loss

MOST = 64
"""Places ahead: what comes later has e^-64 of the weight of the next token, and changes no sum."""


@dataclass(frozen=True)
class TokenOrder(CausalLM):
    """Causal language modelling plus `weight` times a listwise ranking loss of the coming tokens by
    nearness, on the same features with an output head of its own (TOP, Zuhri et al. 2025, section
    3; ListNet, Cao et al. 2007): see rank.py. It looks no further than the end of a piece."""

    weight: float = 1.0
    """Of the ranking loss; 1 in the paper."""
    window: int = 32
    """Coming tokens that are ranked."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(f'--objective.weight is {self.weight}: it must be positive')
        if not 1 <= self.window <= MOST:
            raise UserError(
                f'--objective.window {self.window}: rank 1 to {MOST} tokens, for one that comes '
                'later changes no loss: each place counts e times less than the one before'
            )

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        return {'order_VD': fan_in(key, (model.vocab, model.dim), model.dim)}

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
        x_BTD = self.read(model, batch, compute=compute, key=key)
        of_tokens = super().loss(
            *(model, batch),
            extra=extra,
            compute=compute,
            key=key,
            context=context._replace(features=x_BTD),
        )
        order = rank_loss(
            *(x_BTD, extra['order_VD'], batch['targets'], batch['weights'], batch['segments']),
            *(self.window, model.config.vocab_padding),
        )
        return of_tokens._replace(
            total=of_tokens.total + self.weight * order,
            metrics={**of_tokens.metrics, 'order': order},
        )

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return decoder_flops(model, seq_len, causal=True) + TRAINING * head(model)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'token-order prediction', encoder=False)

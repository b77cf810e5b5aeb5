"""A causal model that also predicts what it will make of the next token (a joint-embedding
prediction, Assran et al. 2023, on text)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.layers import Params
from llama_jax.model.linear import close, project
from llama_jax.model.transformer import Transformer
from llama_jax.model.width import width_of
from llama_jax.objectives.base import ALONE, Batch, Context, Loss, backbone, followed
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.flops import TRAINING, features_flops

TEACHER = 'teacher'
"""What is carried: the exponential average of the backbone."""


@dataclass(frozen=True)
class LatentPrediction(CausalLM):
    """Causal language modelling, and `weight` times the squared distance of unit vectors (Grill et
    al. 2020, equation 2): what a small network makes of the features at a token, to the features
    that a teacher has at the next one. Both losses share the forward pass.

    The teacher is an exponential average of the backbone, without gradient. A validation has none:
    it measures the likelihood alone, which is that of CausalLM.
    """

    weight: float = 0.1
    """Of the distance, beside the negative log-likelihood. 0: there is no teacher, and all is as by
    CausalLM."""
    momentum: float = 0.99
    """So much stays of the teacher in each step."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UserError(f'--objective.weight is {self.weight}: it must be 0 or more')
        if not 0 <= self.momentum < 1:
            raise UserError(f'--objective.momentum is {self.momentum}: it must be in [0, 1)')
        if not self.weight and self.momentum != LatentPrediction.momentum:
            raise UserError(
                f'--objective.momentum {self.momentum} has no effect with --objective.weight 0, '
                'where there is no teacher: leave it out'
            )

    @property
    def lends(self) -> bool:
        return True

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        if not self.weight:
            return {}
        up_key, down_key = jax.random.split(key)
        return {
            'up_DF': fan_in(up_key, (model.dim, model.ffn), model.dim),
            'down_FD': fan_in(down_key, (model.ffn, model.dim), model.ffn),
        }

    def carried(self, model: ModelConfig, params: Params, key: jax.Array) -> Params:
        return {TEACHER: jax.tree.map(jnp.copy, backbone(params))} if self.weight else {}

    def carry(self, carried: Params, params: Params, kept: Batch, step: jax.Array) -> Params:
        if not carried:
            return {}
        return {TEACHER: followed(carried[TEACHER], params, momentum=self.momentum)}

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
        x_BTD = context.features
        if x_BTD is None:
            x_BTD = self.read(model, batch, compute=compute, key=key)
        of_tokens = super().loss(
            *(model, batch),
            extra=extra,
            compute=compute,
            key=key,
            context=context._replace(features=x_BTD),
        )
        if context.step is None or not context.carried:
            return of_tokens
        teacher = layers.bind(model.config, context.carried[TEACHER])
        # Without dropout, as a target.
        y_BTD = jax.lax.stop_gradient(self.read(teacher, batch, compute=compute, key=None))
        up_DF, down_FD = (
            layout.gather(extra[name].astype(x_BTD.dtype), name[-2:])
            for name in ('up_DF', 'down_FD')
        )
        # Of the size that features have at the base: the network reads them as a layer does.
        read_BTD = x_BTD / width_of(model.config).out
        hidden_BTF = jax.nn.gelu(project(read_BTD, up_DF, 'DF'))
        predicted_BTD = close(hidden_BTF, down_FD, 'FD')
        segment_BT = batch['segments']
        followed_BT = (segment_BT[:, :-1] == segment_BT[:, 1:]) & (segment_BT[:, 1:] > 0)
        apart_BT = 2 - 2 * cosine(predicted_BTD[:, :-1], y_BTD[:, 1:])
        distance = jnp.sum(jnp.where(followed_BT, apart_BT, 0), dtype=jnp.float32)
        return of_tokens._replace(
            total=of_tokens.total + self.weight * distance,
            metrics={**of_tokens.metrics, 'latent': distance},
        )

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """The teacher has a forward pass alone, a third of the whole."""
        if not self.weight:
            return super().flops(model, seq_len)
        teacher = features_flops(model, seq_len, causal=True) / 3
        return super().flops(model, seq_len) + teacher + TRAINING * 2 * model.dim * model.ffn


def cosine(a_BTD: Float[Array, 'B T D'], b_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T']:
    """Float32."""
    a_BTD, b_BTD = a_BTD.astype(jnp.float32), b_BTD.astype(jnp.float32)
    squares_BT = jnp.sum(jnp.square(a_BTD), -1) * jnp.sum(jnp.square(b_BTD), -1)
    return jnp.sum(a_BTD * b_BTD, -1) * jax.lax.rsqrt(jnp.maximum(squares_BT, 1e-12))

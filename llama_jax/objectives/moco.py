"""Contrastive learning with a queue (MoCo, He et al. 2020), on crops of texts as Contriever takes
them (Izacard et al. 2022, section 3.2).

Letters of this file: M places for a pair in a row; Q places of the queue; R keys of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.base import ALONE, Batch, Context, Loss, backbone, followed
from llama_jax.objectives.contrastive import DOCUMENT, InfoNCE, at_places, places, places_in
from llama_jax.objectives.flops import features_flops
from llama_jax.objectives.info_nce import NEVER

ENCODER, QUEUE, DOCUMENTS, NEXT = 'encoder', 'queue_QD', 'documents_Q', 'next'
"""What is carried: the encoder of keys, the newest keys and their documents, and the place of the
queue that is written next."""


@dataclass(frozen=True)
class MomentumContrast(InfoNCE):
    """InfoNCE whose keys (view b) are made by an encoder of its own, an exponential average of the
    backbone, which has no gradient. The negatives of a text are the `queue` newest keys of the
    steps before, but for those of its own document.

    A validation knows of no queue: its loss is that of InfoNCE, among the texts of a batch, and
    comparable with it.
    """

    queue: int = 65536
    """Keys that are negatives. They begin as random vectors (MoCo: 65,536; Contriever: 131,072)."""
    momentum: float = 0.999
    """Of the encoder of keys: so much stays of it in each step (Contriever: 0.9995)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views == 'shared':
            raise UserError(
                "views 'shared' are of one pass, and the keys of a queue are of another: set "
                '--objective.views spans'
            )
        if self.queue < 1:
            raise UserError(f'--objective.queue is {self.queue}: it must be 1 or more')
        if not 0 <= self.momentum < 1:
            raise UserError(f'--objective.momentum is {self.momentum}: it must be in [0, 1)')

    def carried(self, model: ModelConfig, params: Params, key: jax.Array) -> Params:
        random_QD = jax.random.normal(key, (self.queue, model.dim))
        return {
            ENCODER: jax.tree.map(jnp.copy, backbone(params)),
            QUEUE: random_QD / jnp.linalg.norm(random_QD, axis=-1, keepdims=True),
            DOCUMENTS: jnp.full(self.queue, -1, jnp.int32),
            NEXT: jnp.zeros((), jnp.int32),
        }

    def carry(self, carried: Params, params: Params, kept: Batch, step: jax.Array) -> Params:
        """The encoder of the next step, and the queue with the keys of this one."""
        encoder = followed(carried[ENCODER], params, momentum=self.momentum)
        return {ENCODER: encoder, **enqueued(carried, **kept)}

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
        carried = context.carried
        if context.step is None:
            return super().loss(model, batch, extra=extra, compute=compute, key=key)
        key_a, key_b = (None, None) if key is None else jax.random.split(key)
        place_BMT = places(batch['a/segments'])
        valid_BM = jnp.any(place_BMT, axis=-1)
        document_BM = at_places(batch[f'a/{DOCUMENT}'], place_BMT)
        query_BMD = self.encode(model, batch, 'a', compute=compute, key=key_a)
        encoder = layers.bind(model.config, carried[ENCODER])
        key_BMD = self.encode(encoder, batch, 'b', compute=compute, key=key_b)

        queue_QD = layout.gather(carried[QUEUE], 'QD')
        # Divided by the temperature, an error of bfloat16 is large.
        cos_BMQ = jnp.einsum('BMD,QD->BMQ', query_BMD, queue_QD, precision='highest')
        other_BMQ = document_BM[..., None] != carried[DOCUMENTS]
        positive_BM = jnp.sum(query_BMD * key_BMD, axis=-1) / self.temperature
        logit_BMQ = jnp.where(other_BMQ, cos_BMQ / self.temperature, NEVER)
        nll_BM = jnp.logaddexp(positive_BM, jax.nn.logsumexp(logit_BMQ, axis=-1)) - positive_BM

        def total(x_BM: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(valid_BM, x_BM, 0), dtype=jnp.float32)

        apart_BM = jnp.sum(jnp.square(query_BMD - key_BMD), axis=-1)
        return Loss(
            total(nll_BM),
            total(jnp.ones_like(nll_BM)),
            {
                'accuracy': total(positive_BM >= jnp.max(logit_BMQ, axis=-1)),
                'alignment': total(apart_BM),
            },
            kept={'key_BMD': key_BMD, 'document_BM': document_BM, 'valid_BM': valid_BM},
        )

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Keys have a forward pass alone, a third of the whole; the queue, which has no gradient,
        is multiplied in the forward pass and once in the backward pass."""
        views = features_flops(model, seq_len // 2, causal=self.causal) * (1 + 1 / 3) / 2
        return views + 4 * places_in(seq_len // 2) * self.queue * model.dim / seq_len

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        for name in ('learned', 'same_dropout'):
            if getattr(self, name):
                raise UserError(
                    f'--objective.{name.replace("_", "-")} has no effect with a queue: leave it out'
                )


def enqueued(
    carried: Params,
    *,
    key_BMD: Float[Array, 'B M D'],
    document_BM: Int[Array, 'B M'],
    valid_BM: Bool[Array, 'B M'],
) -> Params:
    """The queue after the keys of a batch, of the pairs that there are, in their order: they stand
    in the place of the oldest."""
    Q, start = len(carried[DOCUMENTS]), carried[NEXT]
    whole = PartitionSpec()
    key_RD = jax.reshard(key_BMD, whole).reshape(-1, key_BMD.shape[-1])
    document_R, valid_R = (jax.reshard(x, whole).reshape(-1) for x in (document_BM, valid_BM))
    order_R = jnp.argsort(~valid_R, stable=True)
    n = jnp.sum(valid_R, dtype=jnp.int32)
    # The pair that is written to a place last, where there are more pairs than places.
    after_Q = (jnp.arange(Q) - start) % Q
    pair_Q = after_Q + Q * ((n - 1 - after_Q) // Q)
    written_Q = after_Q < n
    from_Q = order_R[jnp.clip(pair_Q, 0, len(order_R) - 1)]
    new_QD = key_RD.at[from_Q].get(out_sharding=layout.param('QD'))
    return {
        QUEUE: jnp.where(written_Q[:, None], new_QD, carried[QUEUE]),
        DOCUMENTS: jnp.where(written_Q, document_R[from_Q], carried[DOCUMENTS]),
        NEXT: (start + n) % Q,
    }

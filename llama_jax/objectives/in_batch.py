"""Cross-entropy of each query's passage among the passages of all queries (DPR, Karpukhin et al.
2020, section 3.2), over the global batch.

Letters of this file: M places for a query in a row of the batch; P passages of a query, the first
of which answers it; R queries of a block; C passages of the global batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout
from llama_jax.objectives.info_nce import NEVER, in_blocks


class Ranked(NamedTuple):
    """Sums over the queries of a batch, float32 []. Only `total` is meant to be differentiated."""

    total: jax.Array
    """Cross-entropy in nats."""
    weight: jax.Array
    """Number of queries."""
    correct: jax.Array
    """Queries whose passage is the most similar of all candidates."""
    candidates: jax.Array
    """Passages among which each is looked for, its own included."""


def ranked(
    query_BMD: Float[Array, 'B M D'],
    passage_BMPD: Float[Array, 'B M P D'],
    *,
    query_id_BM: Int[Array, 'B M'],
    passage_id_BMP: Int[Array, 'B M P'],
    valid_BM: Bool[Array, 'B M'],
    valid_BMP: Bool[Array, 'B M P'],
    temperature: float,
) -> Ranked:
    """-log softmax of cos / temperature at a query's own passage, the vectors being of unit length.

    Candidates are all passages of the global batch, hard negatives included, but for those that are
    no negatives: texts equal to the query's own passage, and what answers an equal query. Ids, 0 or
    more, tell which texts are equal. The gradient flows through the passages of other devices.
    """
    rows = layout.rows()
    ranks = jax.shard_map(_ranks, in_specs=(*(rows,) * 6, PartitionSpec()), out_specs=rows)(
        jax.reshard(query_BMD, rows),
        jax.reshard(passage_BMPD, rows),
        jax.reshard(query_id_BM, rows),
        jax.reshard(passage_id_BMP, rows),
        jax.reshard(valid_BM, rows),
        jax.reshard(valid_BMP, rows),
        jnp.float32(temperature),
    )

    def total(x_BM: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid_BM, x_BM, 0), dtype=jnp.float32)

    return Ranked(
        total=total(jnp.logaddexp(ranks.positive_BM, ranks.log_z_BM) - ranks.positive_BM),
        weight=total(valid_BM),
        correct=total(ranks.positive_BM >= ranks.max_BM),
        candidates=total(1 + ranks.candidates_BM),
    )


class _Ranks(NamedTuple):
    """Of each query. Inside a block, R stands for BM."""

    positive_BM: jax.Array
    """Logit of its own passage."""
    log_z_BM: jax.Array
    """Log of the sum over all others."""
    max_BM: jax.Array
    candidates_BM: jax.Array


def _ranks(
    query_BMD: jax.Array,
    passage_BMPD: jax.Array,
    query_id_BM: jax.Array,
    passage_id_BMP: jax.Array,
    valid_BM: jax.Array,
    valid_BMP: jax.Array,
    temperature: jax.Array,
) -> _Ranks:
    """The part of one device: its own queries, the passages of all."""

    def gathered(x_BMP: jax.Array) -> jax.Array:
        flat = x_BMP.reshape(-1, *x_BMP.shape[3:])
        return jax.lax.all_gather(flat, layout.BATCH_AXES, tiled=True)

    passage_CD, id_C, valid_C = map(gathered, (passage_BMPD, passage_id_BMP, valid_BMP))
    # A hard negative answers no query.
    first_P = jnp.arange(passage_id_BMP.shape[2]) == 0
    answered_C = gathered(jnp.where(first_P, query_id_BM[..., None], -1))

    def block(rows: tuple[jax.Array, ...]) -> _Ranks:
        query_RD, positive_RD, query_id_R, positive_id_R, valid_R = rows
        # Divided by the temperature, an error of bfloat16 is large.
        cos_RC = jnp.einsum('RD,CD->RC', query_RD, passage_CD, precision='highest')
        other_RC = (id_C != positive_id_R[:, None]) & (answered_C != query_id_R[:, None])
        other_RC &= valid_R[:, None] & valid_C
        logit_RC = jnp.where(other_RC, cos_RC / temperature, NEVER)
        return _Ranks(
            jnp.sum(query_RD * positive_RD, axis=-1) / temperature,
            jax.nn.logsumexp(logit_RC, axis=1),
            jnp.max(jax.lax.stop_gradient(logit_RC), axis=1),
            jnp.sum(other_RC, axis=1, dtype=jnp.float32),
        )

    rows = query_BMD, passage_BMPD[:, :, 0], query_id_BM, passage_id_BMP[..., 0], valid_BM
    ranks = in_blocks(block, rows)
    B, M = valid_BM.shape
    return jax.tree.map(lambda x: x.reshape(-1)[: B * M].reshape(B, M), ranks)

"""InfoNCE over the global batch without ever holding the table of all cosines.

One table serves both directions: a row is a text a among all b, a column a text b among all a. It
is formed for a block of rows at a time, and once more in the backward pass; each block leaves its
part of the log-sum-exp of every column. Each device takes its own rows.

Letters of this file: M places for a pair in a row of the batch; R rows of a block; C columns, one
for each place of the global batch; P blocks of all devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout

BLOCK = 1024
"""Rows of one device whose cosines exist at a time."""
NEVER = -1e30
"""Logit of what is no candidate: finite, so that a place without a pair has a gradient of 0."""

Table = TypeVar('Table')


class Sums(NamedTuple):
    """Sums over the pairs of a batch, float32 []. Only `total` is meant to be differentiated."""

    total: jax.Array
    """Cross-entropy in nats, the mean of both directions."""
    weight: jax.Array
    """Number of pairs."""
    correct: jax.Array
    """Pairs whose other view is the most similar of all candidates, the mean of both directions."""
    alignment: jax.Array
    """Squared distance of the two views."""
    uniformity: jax.Array
    """Not a sum: log E exp(-2 |a - b|^2) over views of different documents (Wang & Isola 2020)."""
    candidates: jax.Array
    """Texts among which each view's other is looked for, the mean of both directions."""


def info_nce(
    a_BMD: Float[Array, 'B M D'],
    b_BMD: Float[Array, 'B M D'],
    *,
    document_BM: Int[Array, 'B M'],
    valid_BM: Bool[Array, 'B M'],
    temperature: Float[Array, ''],
) -> Sums:
    """Symmetric InfoNCE of unit vectors over the global batch (Radford et al. 2021, figure 3).

    Every device compares its own `a` with all `b`, which it gathers; the gradient flows through
    the gathered ones as well.
    """
    rows = layout.rows()
    table = jax.shard_map(
        _table, in_specs=(rows, rows, rows, rows, PartitionSpec()), out_specs=rows
    )(
        jax.reshard(a_BMD, rows),
        jax.reshard(b_BMD, rows),
        jax.reshard(document_BM, rows),
        jax.reshard(valid_BM, rows),
        temperature,
    )

    def by_place(x_C: jax.Array) -> jax.Array:
        return jnp.reshape(x_C, valid_BM.shape, out_sharding=rows)

    def total(x_BM: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid_BM, x_BM, 0), dtype=jnp.float32)

    log_z_a_BM = table.row_log_z_BM
    log_z_b_BM = by_place(jax.nn.logsumexp(table.column_log_z_PC, axis=0))
    right_a_BM = table.positive_BM >= table.row_max_BM
    right_b_BM = table.positive_BM >= by_place(jnp.max(table.column_max_PC, axis=0))
    n_apart = jnp.sum(table.n_apart_P)
    mean_near = jnp.sum(table.near_P) / jnp.maximum(n_apart, 1)
    return Sums(
        total=total((log_z_a_BM + log_z_b_BM) / 2 - table.positive_BM),
        weight=total(valid_BM),
        correct=total((right_a_BM.astype(jnp.float32) + right_b_BM) / 2),
        alignment=total(jnp.sum(jnp.square(a_BMD - b_BMD), axis=-1)),
        uniformity=jnp.where(n_apart > 0, jnp.log(mean_near), 0),
        candidates=total(jnp.ones_like(log_z_a_BM)) + n_apart,
    )


class _Table(NamedTuple):
    """What is kept of the logits. Inside a block, R stands for BM, and there is no P."""

    positive_BM: jax.Array
    """Logit of the other view."""
    row_log_z_BM: jax.Array
    row_max_BM: jax.Array
    column_log_z_PC: jax.Array
    column_max_PC: jax.Array
    near_P: jax.Array
    """Sum of exp(-2 |a - b|^2) over the views of different documents."""
    n_apart_P: jax.Array
    """Number of these."""


def _table(
    a_BMD: jax.Array,
    b_BMD: jax.Array,
    document_BM: jax.Array,
    valid_BM: jax.Array,
    temperature: jax.Array,
) -> _Table:
    """The part of one device: its own rows of the table, all columns."""
    B, M, D = a_BMD.shape
    n_rows = B * M

    def gathered(x_BM: jax.Array) -> jax.Array:
        flat = x_BM.reshape(n_rows, *x_BM.shape[2:])
        return jax.lax.all_gather(flat, layout.BATCH_AXES, tiled=True)

    b_CD, document_C, valid_C = gathered(b_BMD), gathered(document_BM), gathered(valid_BM)
    first = jax.lax.axis_index(layout.BATCH_AXES) * n_rows

    def block(rows: tuple[jax.Array, ...]) -> _Table:
        a_RD, document_R, valid_R, index_R = rows
        cos_RC = jnp.einsum(
            'RD,CD->RC',
            a_RD,
            b_CD,
            precision='highest',  # divided by the temperature, an error of bfloat16 is large
        )
        own_RC = index_R[:, None] == jnp.arange(len(b_CD))
        both_RC = valid_R[:, None] & valid_C
        apart_RC = both_RC & ~own_RC & (document_R[:, None] != document_C)
        logit_RC = jnp.where(both_RC & own_RC | apart_RC, cos_RC / temperature, NEVER)
        fixed_RC, cos_RC = jax.lax.stop_gradient((logit_RC, cos_RC))
        return _Table(
            jnp.sum(jnp.where(own_RC, logit_RC, 0), axis=1),
            jax.nn.logsumexp(logit_RC, axis=1),
            jnp.max(fixed_RC, axis=1),
            jax.nn.logsumexp(logit_RC, axis=0),
            jnp.max(fixed_RC, axis=0),
            jnp.sum(jnp.where(apart_RC, jnp.exp(4 * cos_RC - 4), 0)),
            jnp.sum(apart_RC, dtype=jnp.float32),
        )

    index_BM = (first + jnp.arange(n_rows)).reshape(B, M)
    table = in_blocks(block, (a_BMD, document_BM, valid_BM, index_BM))

    def by_row(x: jax.Array) -> jax.Array:
        return x.reshape(-1)[:n_rows].reshape(B, M)

    return table._replace(
        positive_BM=by_row(table.positive_BM),
        row_log_z_BM=by_row(table.row_log_z_BM),
        row_max_BM=by_row(table.row_max_BM),
    )


def in_blocks(
    block: Callable[[tuple[jax.Array, ...]], Table], rows_BM: tuple[jax.Array, ...]
) -> Table:
    """What `block` makes of arrays [R, ...], in blocks of at most BLOCK of the rows [B, M, ...] of
    a device: the results of all blocks, one after another in front. The last block is filled up
    with zeros."""
    B, M = rows_BM[0].shape[:2]
    n_blocks = -(-B * M // BLOCK)
    missing = -(B * M) % n_blocks

    def cut(x_BM: jax.Array) -> jax.Array:
        flat = x_BM.reshape(B * M, *x_BM.shape[2:])
        flat = jnp.pad(flat, [(0, missing)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(n_blocks, -1, *flat.shape[1:])

    rows = tuple(map(cut, rows_BM))
    if n_blocks == 1:  # no loop, and nothing is computed twice
        return jax.tree.map(lambda x: x[None], block(tuple(x[0] for x in rows)))
    return jax.lax.map(jax.checkpoint(block), rows)

"""Listwise ranking of coming tokens by nearness, over a sharded vocabulary: neither logits nor
targets [B, T, V] are ever whole. As softmax.py, whose gradient is ready with the loss.

A token whose first place among the next W is d places after the next one has the score -d; others
have none. The loss is the cross-entropy of softmax(scores) with the softmax of the logits (ListNet,
Cao et al. 2007, equation 8). Letter of this file: W places of the window.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.objectives.softmax import Gathered, at_ids, at_rest, in_use, logits_of, normalised


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def rank_loss(
    x_BTD: Float[Array, 'B T D'],
    head_VD: Float[Array, 'V D'],
    target_BT: Int[Array, 'B T'],
    weight_BT: Float[Array, 'B T'],
    segment_BT: Int[Array, 'B T'],
    window: int,
    padding: int = 0,
) -> jax.Array:
    """The weighted sum over all positions, float32 []; the first arguments are those of
    `cross_entropy`. What comes next at a position are the targets of weight in its segment, from
    its own on."""
    arrays = x_BTD, head_VD, target_BT, weight_BT, segment_BT
    return _chunked(arrays, window, padding, with_gradient=False, of_head=False)[0]


def _forward(
    x: Any, head: Any, target: Any, weight: Any, segment: Any, window: int, padding: int
) -> tuple[jax.Array, Any]:
    arrays = tuple(one.value for one in (x, head, target, weight, segment))
    total, gradients = _chunked(arrays, window, padding, with_gradient=True, of_head=head.perturbed)
    return total, jax.lax.optimization_barrier(gradients)  # see softmax.py


def _backward(window: int, padding: int, gradients: Any, scale: jax.Array) -> tuple[Any, ...]:
    dx_BTD, dhead_VD = gradients
    dhead_VD = None if dhead_VD is None else dhead_VD * scale
    return dx_BTD * scale.astype(dx_BTD.dtype), dhead_VD, None, None, None


rank_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunked(
    arrays: Any, window: int, padding: int, *, with_gradient: bool, of_head: bool
) -> tuple[jax.Array, Any]:
    features, head, rows = layout.act('BTD'), layout.param('VD'), layout.act('BT')
    local = functools.partial(
        _local, window=window, padding=padding, with_gradient=with_gradient, of_head=of_head
    )
    gradients = (features, head if of_head else None) if with_gradient else None
    return jax.shard_map(
        local,
        in_specs=(features, head, rows, rows, rows),
        out_specs=(jax.sharding.PartitionSpec(), gradients),
    )(*arrays)


def _local(
    x_BTD: Any,
    head_VD: Any,
    target_BT: Any,
    weight_BT: Any,
    segment_BT: Any,
    *,
    window: int,
    padding: int,
    with_gradient: bool,
    of_head: bool,
) -> tuple[jax.Array, Any]:
    batch, vocab = layout.BATCH_AXES, layout.VOCAB_AXIS
    head_VD = in_use(head_VD, x_BTD.dtype)
    B, T = target_BT.shape
    gather, place_BT = Gathered.of(weight_BT), jnp.arange(B * T).reshape(B, T)
    real_BT = weight_BT > 0
    before_BT = _before(jnp.where(real_BT, target_BT, -1), segment_BT)
    known = target_BT, real_BT, segment_BT, place_BT // T, before_BT
    target_P, real_P, segment_P, row_P, before_P = (x_BT.reshape(-1) for x_BT in known)

    def wanted(place_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ids [C, W] of what comes next, and what of the target distribution each has."""
        place_CW = place_C[:, None] + jnp.arange(window)
        at_CW, at_C1 = jnp.minimum(place_CW, B * T - 1), place_C[:, None]
        same_CW = (segment_P[at_CW] == segment_P[at_C1]) & (row_P[at_CW] == row_P[at_C1])
        first_CW = before_P[at_CW] < at_C1
        counts_CW = (place_CW < B * T) & real_P[at_CW] & same_CW & first_CW
        score_CW = jnp.where(counts_CW, jnp.exp(-jnp.arange(window, dtype=jnp.float32)), 0)
        total_C1 = score_CW.sum(axis=1, keepdims=True)
        return target_P[at_CW], score_CW / jnp.maximum(total_C1, jnp.finfo(jnp.float32).tiny)

    def step(i: jax.Array, carry: Any) -> Any:
        total, dx_BTD, dhead_VD = carry
        x_CD, weight_C, place_C = (gather.chunk(x, i) for x in (x_BTD, weight_BT, place_BT))
        id_CW, p_CW = wanted(place_C)
        logit_CV = logits_of(x_CD, head_VD, padding)
        softmax = normalised(logit_CV)
        log_q_CW = at_ids(logit_CV, id_CW) - softmax.log_z_C[:, None]
        total += jnp.sum(weight_C * -jnp.sum(p_CW * log_q_CW, axis=1))
        if not with_gradient:
            return total, None, None
        C, V = logit_CV.shape
        local_CW = id_CW - jax.lax.axis_index(vocab) * V
        local_CW = jnp.where((local_CW >= 0) & (local_CW < V), local_CW, V)
        dlogit_CV = softmax.exp_CV / softmax.z_C[:, None]
        dlogit_CV = dlogit_CV.at[jnp.arange(C)[:, None], local_CW].add(-p_CW, mode='drop')
        dlogit_CV = (dlogit_CV * weight_C[:, None]).astype(x_CD.dtype)
        dx_CD = jax.lax.psum(jnp.einsum('CV,VD->CD', dlogit_CV, head_VD), vocab)
        dx_BTD = gather.put(dx_BTD, dx_CD, i)
        if of_head:
            dhead_VD += jnp.einsum('CV,CD->VD', dlogit_CV, x_CD, preferred_element_type=jnp.float32)
        return total, dx_BTD, dhead_VD

    varying = functools.partial(jax.lax.pcast, to='varying')
    zero = varying(jnp.zeros(()), batch)
    dx_BTD = varying(jnp.zeros(x_BTD.shape, x_BTD.dtype), batch) if with_gradient else None
    dhead_VD = varying(jnp.zeros(head_VD.shape), (*batch, vocab)) if of_head else None
    total, dx_BTD, dhead_VD = jax.lax.fori_loop(0, gather.n, step, (zero, dx_BTD, dhead_VD))
    total = jax.lax.psum(total, batch)
    if not with_gradient:
        return total, None
    return total, (dx_BTD, at_rest(dhead_VD) if of_head else None)


def _before(target_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
    """Where each target stood last before, in its segment: places of all rows, one after the other;
    -1: nowhere."""
    B, T = target_BT.shape
    order_BT = jnp.argsort(target_BT, axis=1, stable=True)
    target_BT, segment_BT = (
        jnp.take_along_axis(x_BT, order_BT, axis=1) for x_BT in (target_BT, segment_BT)
    )
    same_BT = (target_BT[:, 1:] == target_BT[:, :-1]) & (segment_BT[:, 1:] == segment_BT[:, :-1])
    row_B1 = jnp.arange(B)[:, None]
    before_BT = jnp.where(same_BT, row_B1 * T + order_BT[:, :-1], -1)
    before_BT = jnp.pad(before_BT, ((0, 0), (1, 0)), constant_values=-1)
    return jnp.zeros_like(before_BT).at[row_B1, order_BT].set(before_BT)

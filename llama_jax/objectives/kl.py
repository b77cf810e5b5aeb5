"""Divergence of a model from its teacher over a sharded vocabulary without ever holding the logits
of either: as softmax.py, whose gradient is ready with the loss.

Letter of this file: k ids of a teacher's most likely tokens.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.objectives.softmax import (
    Chunks,
    Normalised,
    at_ids,
    at_rest,
    in_use,
    logits_of,
    normalised,
    scored,
)


class Online(NamedTuple):
    """A teacher by what it computes of the same tokens."""

    x_BTD: Float[Array, 'B T D']
    head_VD: Float[Array, 'V D']
    """At rest. Width is the teacher's own; the ids are the student's."""


class TopK(NamedTuple):
    """A teacher by its most likely tokens, under its softmax at the temperature of the loss."""

    id_BTk: Int[Array, 'B T k']
    log_p_BTk: Float[Array, 'B T k']
    log_rest_BT: Float[Array, 'B T']
    """Log-probability of all other tokens together; -inf where there are none."""


class Mix(NamedTuple):
    """alpha T^2 KL(teacher || student) + (1 - alpha) (nll + z_loss log(Z)^2)."""

    alpha: float
    temperature: float
    z_loss: float
    padding: int = 0
    """The last so many rows of the vocabulary are no tokens."""


class Distilled(NamedTuple):
    """Weighted sums over all tokens, float32 []. Only `total` has a gradient."""

    total: jax.Array
    kl: jax.Array
    """In nats, at the temperature; of a teacher by its top k, with all other tokens as one."""
    nll: jax.Array
    correct: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def distilled(
    x_BTD: Float[Array, 'B T D'],
    head_VD: Float[Array, 'V D'],
    target_BT: Int[Array, 'B T'],
    weight_BT: Float[Array, 'B T'],
    teacher: Online | TopK,
    mix: Mix,
) -> Distilled:
    """The loss of `mix` (Hinton et al. 2015, section 2). Arguments are those of `cross_entropy`;
    the teacher gets no gradient."""
    arrays = x_BTD, head_VD, target_BT, weight_BT, teacher
    return _chunked(*arrays, mix, with_gradient=False, of_head=False)[0]


def _forward(
    x: Any, head: Any, target: Any, weight: Any, teacher: Any, mix: Mix
) -> tuple[Distilled, Any]:
    teacher = jax.tree.map(lambda primal: primal.value, teacher)
    arrays = x.value, head.value, target.value, weight.value, teacher
    sums, gradients = _chunked(*arrays, mix, with_gradient=True, of_head=head.perturbed)
    return sums, jax.lax.optimization_barrier(gradients)  # see softmax.py


def _backward(mix: Mix, gradients: Any, cotangent: Distilled) -> tuple[Any, ...]:
    dx_BTD, dhead_VD = gradients
    scale = cotangent.total
    dhead_VD = None if dhead_VD is None else dhead_VD * scale
    return dx_BTD * scale.astype(dx_BTD.dtype), dhead_VD, None, None, None


distilled.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunked(
    x_BTD: Any,
    head_VD: Any,
    target_BT: Any,
    weight_BT: Any,
    teacher: Online | TopK,
    mix: Mix,
    *,
    with_gradient: bool,
    of_head: bool,
) -> tuple[Distilled, Any]:
    features: Any = layout.act('BTD')
    head: Any = layout.param('VD')
    of_teacher: Any = layout.rows()
    rows = layout.act('BT')
    if isinstance(teacher, Online):
        of_teacher = Online(features, head)  # type: ignore[arg-type]
    return jax.shard_map(
        functools.partial(_local, mix=mix, with_gradient=with_gradient, of_head=of_head),
        in_specs=(features, head, rows, rows, of_teacher),
        out_specs=(
            jax.sharding.PartitionSpec(),
            (features, head if of_head else None) if with_gradient else None,
        ),
    )(x_BTD, head_VD, target_BT, weight_BT, teacher)


def _local(
    x_BTD: Any,
    head_VD: Any,
    target_BT: Any,
    weight_BT: Any,
    teacher: Online | TopK,
    *,
    mix: Mix,
    with_gradient: bool,
    of_head: bool,
) -> tuple[Distilled, Any]:
    batch, vocab = layout.BATCH_AXES, layout.VOCAB_AXIS
    alpha, temperature, z_loss, padding = mix
    head_VD = in_use(head_VD, x_BTD.dtype)
    tokens = Chunks(*target_BT.shape)
    if isinstance(teacher, Online):
        their_head_VD = in_use(teacher.head_VD, teacher.x_BTD.dtype)
        shown: Any = teacher.x_BTD
    else:
        shown = teacher

    def step(carry: Any, chunk: Any) -> tuple[Any, Any]:
        sums, dhead_VD = carry
        x_CD, target_C, weight_C, shown = chunk
        logit_CV = logits_of(x_CD, head_VD, padding)
        scores = scored(logit_CV, target_C)
        own = normalised(logit_CV / temperature)
        if isinstance(shown, TopK):
            kl_C, dlogit_CV = _of_top(logit_CV / temperature, own, shown)
        else:
            their_CV = logits_of(shown, their_head_VD, padding) / temperature
            kl_C, dlogit_CV = _of_all(logit_CV / temperature, own, their_CV)
        ce_C = scores.nll_C + z_loss * jnp.square(scores.softmax.log_z_C)
        each_C = alpha * temperature**2 * kl_C + (1 - alpha) * ce_C
        sums = Distilled(
            sums.total + jnp.sum(weight_C * each_C),
            sums.kl + jnp.sum(weight_C * kl_C),
            sums.nll + jnp.sum(weight_C * scores.nll_C),
            sums.correct + jnp.sum(weight_C * scores.correct_C),
        )
        if not with_gradient:
            return (sums, None), None
        # One division by the temperature is that of the logits.
        dlogit_CV *= (alpha * temperature * weight_C)[:, None]
        dlogit_CV += scores.dlogits((1 - alpha) * weight_C, z_loss)
        dlogit_CV = dlogit_CV.astype(x_CD.dtype)
        dx_CD = jax.lax.psum(jnp.einsum('CV,VD->CD', dlogit_CV, head_VD), vocab)
        if of_head:
            dhead_VD += jnp.einsum('CV,CD->VD', dlogit_CV, x_CD, preferred_element_type=jnp.float32)
        return (sums, dhead_VD), dx_CD

    zero = jax.lax.pcast(jnp.zeros(()), batch, to='varying')
    dhead_VD = None
    if of_head:
        dhead_VD = jnp.zeros(head_VD.shape, jnp.float32)
        dhead_VD = jax.lax.pcast(dhead_VD, (*batch, vocab), to='varying')
    chunks = jax.tree.map(tokens.cut, (x_BTD, target_BT, weight_BT, shown))
    (sums, dhead_VD), dx = jax.lax.scan(step, (Distilled(*4 * (zero,)), dhead_VD), chunks)
    sums = jax.tree.map(lambda value: jax.lax.psum(value, batch), sums)
    if not with_gradient:
        return sums, None
    return sums, (tokens.joined(dx), at_rest(dhead_VD) if of_head else None)


def _of_all(
    logit_CV: jax.Array, own: Normalised, their_CV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """KL(teacher || student) of a chunk, and its gradient to the student's logits."""
    theirs = normalised(their_CV)
    p_CV = theirs.exp_CV / theirs.z_C[:, None]
    log_ratio_CV = (their_CV - theirs.log_z_C[:, None]) - (logit_CV - own.log_z_C[:, None])
    # Rows that are no tokens have p = 0, and no logit.
    kl_C = jnp.sum(jnp.where(p_CV > 0, p_CV * log_ratio_CV, 0), axis=-1)
    q_CV = own.exp_CV / own.z_C[:, None]
    return jax.lax.psum(kl_C, layout.VOCAB_AXIS), q_CV - p_CV


def _of_top(logit_CV: jax.Array, own: Normalised, top: TopK) -> tuple[jax.Array, jax.Array]:
    """The same over k + 1 outcomes: the teacher's top k, and any other token. Among the others the
    student is free, as far as this term goes."""
    id_Ck, log_p_Ck, log_rest_C = top
    of_top = _places(id_Ck, logit_CV.shape)
    is_top_CV = jnp.zeros(logit_CV.shape, bool).at[of_top].set(True, mode='drop')
    p_Ck, rest_C = jnp.exp(log_p_Ck), jnp.exp(log_rest_C)
    q_CV = own.exp_CV / own.z_C[:, None]
    log_q_Ck = at_ids(logit_CV, id_Ck) - own.log_z_C[:, None]
    q_rest_C = jax.lax.psum(jnp.sum(jnp.where(is_top_CV, 0, q_CV), -1), layout.VOCAB_AXIS)
    q_rest_C = jnp.maximum(q_rest_C, jnp.finfo(jnp.float32).tiny)
    kl_C = jnp.sum(p_Ck * (log_p_Ck - log_q_Ck), axis=-1)
    kl_C += jnp.where(rest_C > 0, rest_C * (log_rest_C - jnp.log(q_rest_C)), 0)
    wanted_CV = jnp.zeros(logit_CV.shape).at[of_top].set(p_Ck, mode='drop')
    wanted_CV += jnp.where(is_top_CV, 0, q_CV * (rest_C / q_rest_C)[:, None])
    return kl_C, q_CV - wanted_CV


def _places(id_Ck: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Where ids of the whole vocabulary are in this part of it [C, V]; beyond it for the others,
    which `mode='drop'` leaves out."""
    C, V = shape
    local_Ck = id_Ck - jax.lax.axis_index(layout.VOCAB_AXIS) * V
    return jnp.arange(C)[:, None], jnp.where((local_Ck >= 0) & (local_Ck < V), local_Ck, V)


def top_k(
    x_BTD: Float[Array, 'B T D'],
    head_VD: Float[Array, 'V D'],
    *,
    k: int,
    temperature: float,
    padding: int,
) -> TopK:
    """What a teacher says, for `distilled` to learn from later. No gradient."""
    return jax.shard_map(
        functools.partial(_local_top, k=k, temperature=temperature, padding=padding),
        in_specs=(layout.act('BTD'), layout.param('VD')),
        out_specs=layout.rows(),
        check_vma=False,  # all parts of the vocabulary are gathered
    )(x_BTD, head_VD)


def _local_top(
    x_BTD: jax.Array, head_VD: jax.Array, *, k: int, temperature: float, padding: int
) -> TopK:
    head_VD = in_use(head_VD, x_BTD.dtype)
    first_id = jax.lax.axis_index(layout.VOCAB_AXIS) * head_VD.shape[0]
    tokens = Chunks(*x_BTD.shape[:2])

    def step(_: None, x_CD: jax.Array) -> tuple[None, TopK]:
        logit_CV = logits_of(x_CD, head_VD, padding) / temperature
        softmax = normalised(logit_CV)
        # The k largest of all parts are among the k largest of each.
        own_Ck, id_Ck = jax.lax.top_k(logit_CV, min(k, logit_CV.shape[1]))
        of_all_Cn, id_Cn = (
            jax.lax.all_gather(x, layout.VOCAB_AXIS, axis=1, tiled=True)
            for x in (own_Ck, id_Ck + first_id)
        )
        top_Ck, at_Ck = jax.lax.top_k(of_all_Cn, k)
        top_id_Ck = jnp.take_along_axis(id_Cn, at_Ck, axis=1).astype(jnp.int32)
        # Summed over what is left, for 1 - sum would be rounding alone where k is large.
        of_top = _places(top_id_Ck, logit_CV.shape)
        left_CV = softmax.exp_CV.at[of_top].set(0, mode='drop')
        rest_C = jax.lax.psum(jnp.sum(left_CV, axis=-1), layout.VOCAB_AXIS)
        return None, TopK(
            top_id_Ck,
            top_Ck - softmax.log_z_C[:, None],
            jnp.log(rest_C) - jnp.log(softmax.z_C),
        )

    _, tops = jax.lax.scan(step, None, tokens.cut(x_BTD))
    return jax.tree.map(tokens.joined, tops)

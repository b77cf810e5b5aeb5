"""Log-probabilities of given tokens over a sharded vocabulary without ever holding the logits.

For losses that are no sum over tokens, such as those of preferences and of policies: what weight a
token's log-probability has is known only once all of them are. So the backward pass forms the
logits of each chunk a second time, where a cross-entropy has its gradient ready (softmax.py).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.objectives.softmax import Chunks, at_rest, in_use, logits_of, scored


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def log_probs(
    x_BTD: Float[Array, 'B T D'],
    head_VD: Float[Array, 'V D'],
    target_BT: Int[Array, 'B T'],
    padding: int = 0,
) -> Float[Array, 'B T']:
    """log p(target) under the softmax of `x_BTD @ head_VD.T`, in nats, float32.

    The head comes as it lies at rest; products are taken in the type of `x_BTD`. The last `padding`
    rows of the vocabulary are no tokens.
    """
    return _of_targets(x_BTD, head_VD, target_BT, padding)[0]


def _of_targets(
    x_BTD: Any, head_VD: Any, target_BT: Any, padding: int
) -> tuple[jax.Array, jax.Array]:
    rows, head = layout.act('BT'), layout.param('VD')
    return jax.shard_map(
        functools.partial(_local, padding=padding),
        in_specs=(layout.act('BTD'), head, rows),
        out_specs=(rows, rows),
    )(x_BTD, head_VD, target_BT)


def _forward(x: Any, head: Any, target: Any, padding: int) -> tuple[jax.Array, Any]:
    log_p_BT, log_z_BT = _of_targets(x.value, head.value, target.value, padding)
    # A head that is not trained needs no gradient: said by what is kept, which is arrays alone.
    of_head = (jnp.zeros(()),) if head.perturbed else ()
    return log_p_BT, (x.value, head.value, target.value, log_z_BT, of_head)


def _backward(padding: int, kept: Any, dlog_p_BT: jax.Array) -> tuple[Any, ...]:
    rows, features, head = layout.act('BT'), layout.act('BTD'), layout.param('VD')
    x_BTD, head_VD, target_BT, log_z_BT, of_head = kept
    gradients = jax.shard_map(
        functools.partial(_local_gradient, padding=padding, of_head=bool(of_head)),
        in_specs=(features, head, rows, rows, rows),
        out_specs=(features, head if of_head else None),
    )(x_BTD, head_VD, target_BT, log_z_BT, dlog_p_BT)
    # As in softmax.py: the head's gradient is exchanged before the layers' backward pass begins.
    dx_BTD, dhead_VD = jax.lax.optimization_barrier(gradients)
    return dx_BTD, dhead_VD, None


log_probs.defvjp(_forward, _backward, symbolic_zeros=True)


def _local(
    x_BTD: jax.Array, head_VD: jax.Array, target_BT: jax.Array, *, padding: int
) -> tuple[jax.Array, jax.Array]:
    head_VD = in_use(head_VD, x_BTD.dtype)
    tokens = Chunks(*target_BT.shape)

    def step(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        x_CD, target_C = chunk
        scores = scored(logits_of(x_CD, head_VD, padding), target_C)
        return None, (-scores.nll_C, scores.softmax.log_z_C)

    _, (log_p, log_z) = jax.lax.scan(step, None, (tokens.cut(x_BTD), tokens.cut(target_BT)))
    return tokens.joined(log_p), tokens.joined(log_z)


def _local_gradient(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    log_z_BT: jax.Array,
    dlog_p_BT: jax.Array,
    *,
    padding: int,
    of_head: bool,
) -> tuple[jax.Array, jax.Array | None]:
    vocab = layout.VOCAB_AXIS
    head_VD = in_use(head_VD, x_BTD.dtype)
    V = head_VD.shape[0]
    id_V = jax.lax.axis_index(vocab) * V + jnp.arange(V)
    tokens = Chunks(*target_BT.shape)

    def step(dhead_VD: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        x_CD, target_C, log_z_C, dlog_p_C = chunk
        p_CV = jnp.exp(logits_of(x_CD, head_VD, padding) - log_z_C[:, None])
        is_target_CV = target_C[:, None] == id_V
        dlogit_CV = dlog_p_C[:, None] * (is_target_CV - p_CV)
        dlogit_CV = dlogit_CV.astype(x_CD.dtype)
        dx_CD = jax.lax.psum(jnp.einsum('CV,VD->CD', dlogit_CV, head_VD), vocab)
        if of_head:
            dhead_VD += jnp.einsum('CV,CD->VD', dlogit_CV, x_CD, preferred_element_type=jnp.float32)
        return dhead_VD, dx_CD

    zero_VD = None
    if of_head:
        zero_VD = jnp.zeros(head_VD.shape, jnp.float32)
        zero_VD = jax.lax.pcast(zero_VD, (*layout.BATCH_AXES, vocab), to='varying')
    chunks = tuple(map(tokens.cut, (x_BTD, target_BT, log_z_BT, dlog_p_BT)))
    dhead_VD, dx = jax.lax.scan(step, zero_VD, chunks)
    return tokens.joined(dx), at_rest(dhead_VD) if of_head else None

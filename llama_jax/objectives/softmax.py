"""Cross-entropy over a sharded vocabulary without ever holding the logits.

Logits are formed for a chunk of tokens at a time and used at once for the loss and, when the loss
is differentiated, for its gradient: the backward pass repeats no matrix product, and [B, T, V]
exists nowhere. That makes three products with the head in all, like an unchunked loss, where
rematerialised chunks make four.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout

CHUNK_TOKENS = 1024
"""Tokens of one device whose logits exist at a time."""


class CrossEntropy(NamedTuple):
    """Weighted sums over all tokens, float32 []. Only `total` has a gradient."""

    total: jax.Array
    """-log p(target) + z_loss * log(Z)^2."""
    nll: jax.Array
    """-log p(target), in nats."""
    correct: jax.Array
    """Targets that are the most likely token."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x_BTD: Float[Array, 'B T D'],
    head_VD: Float[Array, 'V D'],
    target_BT: Int[Array, 'B T'],
    weight_BT: Float[Array, 'B T'],
    z_loss: float,
    padding: int = 0,
) -> CrossEntropy:
    """Softmax cross-entropy of `x_BTD @ head_VD.T` with `target_BT`, plus z-loss.

    z-loss keeps the partition function near one (Chowdhery et al. 2022, section 5). The head comes
    as it lies at rest, in float32; products are taken in the type of `x_BTD`, the softmax in
    float32. Tokens of weight 0 cost no accuracy but time. The last `padding` rows of the vocabulary
    are no tokens: they have no probability, and their gradient is 0.
    """
    how: dict[str, Any] = {'z_loss': z_loss, 'padding': padding}
    how |= {'with_gradient': False, 'of_head': False}
    return _chunked(x_BTD, head_VD, target_BT, weight_BT, **how)[0]


def _forward(
    x: Any, head: Any, target: Any, weight: Any, z_loss: float, padding: int
) -> tuple[CrossEntropy, Any]:
    # A head that is not trained needs a product less, and no room for its gradient.
    how: dict[str, Any] = {'z_loss': z_loss, 'padding': padding}
    how |= {'with_gradient': True, 'of_head': head.perturbed}
    sums, gradients = _chunked(x.value, head.value, target.value, weight.value, **how)
    # dhead_VD is exchanged before the layers' backward pass begins: else the compiler may hold
    # every device's own [V, D] until after it, where memory peaks.
    return sums, jax.lax.optimization_barrier(gradients)


def _backward(
    z_loss: float, padding: int, gradients: Any, cotangent: CrossEntropy
) -> tuple[Any, ...]:
    dx_BTD, dhead_VD = gradients
    scale = cotangent.total
    dhead_VD = None if dhead_VD is None else dhead_VD * scale
    return (dx_BTD * scale.astype(dx_BTD.dtype), dhead_VD, None, None)


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunked(
    x_BTD: Any,
    head_VD: Any,
    target_BT: Any,
    weight_BT: Any,
    *,
    z_loss: float,
    padding: int,
    with_gradient: bool,
    of_head: bool,
) -> tuple[CrossEntropy, Any]:
    """Each device takes its own rows and its own part of the vocabulary."""
    batch_P, head_P = layout.act('BTD'), layout.param('VD')
    return jax.shard_map(
        functools.partial(
            _local, z_loss=z_loss, padding=padding, with_gradient=with_gradient, of_head=of_head
        ),
        in_specs=(batch_P, head_P, layout.act('BT'), layout.act('BT')),
        out_specs=(
            jax.sharding.PartitionSpec(),
            (batch_P, head_P if of_head else None) if with_gradient else None,
        ),
    )(x_BTD, head_VD, target_BT, weight_BT)


def _local(
    x_BTD: Any,
    head_VD: Any,
    target_BT: Any,
    weight_BT: Any,
    *,
    z_loss: float,
    padding: int,
    with_gradient: bool,
    of_head: bool,
) -> tuple[CrossEntropy, Any]:
    B, T, D = x_BTD.shape
    batch, vocab = layout.BATCH_AXES, layout.VOCAB_AXIS
    head_VD = in_use(head_VD, x_BTD.dtype)
    V = head_VD.shape[0]
    tokens = Chunks(B, T)

    def step(carry, chunk):
        sums, dhead_VD = carry
        x_CD, target_C, weight_C = chunk
        scores = scored(logits_of(x_CD, head_VD, padding), target_C)
        log_z_C = scores.softmax.log_z_C
        sums = CrossEntropy(
            sums.total + jnp.sum(weight_C * (scores.nll_C + z_loss * jnp.square(log_z_C))),
            sums.nll + jnp.sum(weight_C * scores.nll_C),
            sums.correct + jnp.sum(weight_C * scores.correct_C),
        )
        if not with_gradient:
            return (sums, None), None
        dlogit_CV = scores.dlogits(weight_C, z_loss).astype(x_CD.dtype)
        dx_CD = jax.lax.psum(jnp.einsum('CV,VD->CD', dlogit_CV, head_VD), vocab)
        if of_head:
            dhead_VD += jnp.einsum('CV,CD->VD', dlogit_CV, x_CD, preferred_element_type=jnp.float32)
        return (sums, dhead_VD), dx_CD

    zero = jax.lax.pcast(jnp.zeros(()), batch, to='varying')
    dhead_VD = None
    if of_head:
        dhead_VD = jax.lax.pcast(jnp.zeros((V, D)), (*batch, vocab), to='varying')
    (sums, dhead_VD), dx = jax.lax.scan(
        step,
        (CrossEntropy(zero, zero, zero), dhead_VD),
        tuple(map(tokens.cut, (x_BTD, target_BT, weight_BT))),
    )
    sums = jax.tree.map(lambda value: jax.lax.psum(value, batch), sums)
    if not with_gradient:
        return sums, None
    return sums, (tokens.joined(dx), at_rest(dhead_VD) if of_head else None)


class Chunks(NamedTuple):
    """The tokens of one device in chunks, whose logits exist one after another."""

    B: int
    T: int

    @property
    def n(self) -> int:
        return max(1, -(-self.B * self.T // CHUNK_TOKENS))

    def cut(self, array: jax.Array) -> jax.Array:
        """[B, T, ...] -> [n, tokens, ...], padded by zeros."""
        flat = array.reshape(self.B * self.T, *array.shape[2:])
        missing = -len(flat) % self.n
        flat = jnp.pad(flat, [(0, missing)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(self.n, -1, *flat.shape[1:])

    def joined(self, array: jax.Array) -> jax.Array:
        """[n, tokens, ...] -> [B, T, ...]."""
        flat = array.reshape(-1, *array.shape[2:])[: self.B * self.T]
        return flat.reshape(self.B, self.T, *flat.shape[1:])


def in_use(head_VD: jax.Array, dtype: Any) -> jax.Array:
    """A head at rest as each device uses it, within a shard_map: its own part of the vocabulary."""
    head_VD = jax.lax.all_gather(head_VD.astype(dtype), layout.SHARD_AXIS, axis=1, tiled=True)
    # The gradient of the head is summed over rows on each device first and exchanged once.
    return jax.lax.pcast(head_VD, layout.REPLICA_AXES, to='varying')


def at_rest(dhead_VD: Any) -> jax.Array:
    """The gradient of such a head, summed over the devices."""
    dhead_VD = jax.lax.psum_scatter(dhead_VD, layout.SHARD_AXIS, scatter_dimension=1, tiled=True)
    return jax.lax.psum(dhead_VD, layout.REPLICA_AXES)


def logits_of(x_CD: jax.Array, head_VD: jax.Array, padding: int) -> jax.Array:
    """Float32 logits [C, V] of this part of the vocabulary; -inf for rows that no token has."""
    logit_CV = jnp.einsum('CD,VD->CV', x_CD, head_VD, preferred_element_type=jnp.float32)
    if not padding:
        return logit_CV
    V, vocab = head_VD.shape[0], layout.VOCAB_AXIS
    id_V = jax.lax.axis_index(vocab) * V + jnp.arange(V)
    return jnp.where(id_V < jax.lax.axis_size(vocab) * V - padding, logit_CV, -jnp.inf)


class Normalised(NamedTuple):
    """A softmax of logits [C, V] over the whole vocabulary, of which each device has a part."""

    exp_CV: jax.Array
    """exp(logit - max)."""
    z_C: jax.Array
    """Sum of those over the whole vocabulary."""
    log_z_C: jax.Array
    max_C: jax.Array


class Scores(NamedTuple):
    """Of a chunk of tokens, over one device's part of the vocabulary."""

    softmax: Normalised
    nll_C: jax.Array
    correct_C: jax.Array
    local_C: jax.Array
    """The target by its place in this part of the vocabulary."""

    def dlogits(self, weight_C: jax.Array, z_loss: float) -> jax.Array:
        """The gradient [C, V] of the weighted sum of nll + z_loss * log(Z)^2 to the logits."""
        _, z_C, log_z_C, _ = self.softmax
        scale_C = weight_C * (1 + 2 * z_loss * log_z_C) / z_C
        is_target_CV = self.local_C[:, None] == jnp.arange(self.softmax.exp_CV.shape[1])
        return self.softmax.exp_CV * scale_C[:, None] - jnp.where(
            is_target_CV, weight_C[:, None], 0
        )


def normalised(logit_CV: jax.Array) -> Normalised:
    max_C = jax.lax.pmax(jnp.max(logit_CV, axis=-1), layout.VOCAB_AXIS)
    exp_CV = jnp.exp(logit_CV - max_C[:, None])
    z_C = jax.lax.psum(jnp.sum(exp_CV, axis=-1), layout.VOCAB_AXIS)
    return Normalised(exp_CV, z_C, jnp.log(z_C) + max_C, max_C)


def at_ids(x_CV: jax.Array, id_Ck: jax.Array) -> jax.Array:
    """Values [C, k] of some ids of the whole vocabulary, each from the device that has it."""
    V = x_CV.shape[1]
    local_Ck = id_Ck - jax.lax.axis_index(layout.VOCAB_AXIS) * V
    x_Ck = jnp.take_along_axis(x_CV, jnp.clip(local_Ck, 0, V - 1), axis=1)
    mine_Ck = (local_Ck >= 0) & (local_Ck < V)
    return jax.lax.psum(jnp.where(mine_Ck, x_Ck, 0), layout.VOCAB_AXIS)


def scored(logit_CV: jax.Array, target_C: jax.Array) -> Scores:
    """What the logits of a chunk say of the targets."""
    softmax = normalised(logit_CV)
    target_logit_C = at_ids(logit_CV, target_C[:, None])[:, 0]
    first_id = jax.lax.axis_index(layout.VOCAB_AXIS) * logit_CV.shape[1]
    return Scores(
        softmax,
        nll_C=softmax.log_z_C - target_logit_C,
        correct_C=target_logit_C >= softmax.max_C,
        local_C=target_C - first_id,
    )

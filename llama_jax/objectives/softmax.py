"""Cross-entropy over a sharded vocabulary, where there is loss, without ever holding the logits.

Tokens that bear loss are gathered, a chunk of them at a time. Its logits are formed and used at
once for the loss and, when the loss is differentiated, for its gradient: the backward pass repeats
no matrix product, and [B, T, V] exists nowhere. That makes three products with the head in all,
like an unchunked loss, where rematerialised chunks make four.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout

CHUNK_TOKENS = 1024
"""Tokens of one device whose logits exist at a time, at most."""
_CHUNKS = 16
"""Chunks in which a few tokens are cut, so that few places of the last one stay empty."""
_SMALLEST = 128
"""Fewest tokens per chunk."""


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
    never_BT: Int[Array, 'B T'] | None = None,
) -> CrossEntropy:
    """Softmax cross-entropy of `x_BTD @ head_VD.T` with `target_BT`, plus z-loss.

    z-loss keeps the partition function near one (Chowdhery et al. 2022, section 5). The head comes
    as it lies at rest, in float32; products are taken in the type of `x_BTD`, the softmax in
    float32. Tokens of weight 0 cost next to nothing, wherever they stand: as many chunks are
    computed as the device with most tokens of another weight has. The last `padding` rows of the
    vocabulary are no tokens: they have no probability, and their gradient is 0; nor has the id
    `never_BT` at its place, such as that of a mask which stands for a token.
    """
    how: dict[str, Any] = {'z_loss': z_loss, 'padding': padding}
    how |= {'with_gradient': False, 'of_head': False}
    return _chunked(x_BTD, head_VD, target_BT, weight_BT, never_BT, **how)[0]


def _forward(
    x: Any, head: Any, target: Any, weight: Any, z_loss: float, padding: int, never: Any
) -> tuple[CrossEntropy, Any]:
    # A head that is not trained needs a product less, and no room for its gradient.
    how: dict[str, Any] = {'z_loss': z_loss, 'padding': padding}
    how |= {'with_gradient': True, 'of_head': head.perturbed}
    ids = None if never is None else never.value
    sums, gradients = _chunked(x.value, head.value, target.value, weight.value, ids, **how)
    # dhead_VD is exchanged before the layers' backward pass begins: else the compiler may hold
    # every device's own [V, D] until after it, where memory peaks.
    return sums, jax.lax.optimization_barrier(gradients)


def _backward(
    z_loss: float, padding: int, gradients: Any, cotangent: CrossEntropy
) -> tuple[Any, ...]:
    dx_BTD, dhead_VD = gradients
    scale = cotangent.total
    dhead_VD = None if dhead_VD is None else dhead_VD * scale
    return (dx_BTD * scale.astype(dx_BTD.dtype), dhead_VD, None, None, None)


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def cross_entropies(
    x_JBTD: Float[Array, 'J B T D'],
    head_VD: Float[Array, 'V D'],
    target_JBT: Int[Array, 'J B T'],
    weight_JBT: Float[Array, 'J B T'],
    scale_J: Float[Array, ' J'],
    z_loss: float,
    padding: int = 0,
) -> tuple[jax.Array, CrossEntropy]:
    """The sum over j of scale_j times the total of `cross_entropy` j, and the sums [J] of each,
    which have no gradient. All share one head, and go one after the other: logits of one exist at a
    time, and one gradient of the head (Gloeckle et al. 2024, figure 2)."""
    how: dict[str, Any] = {'z_loss': z_loss, 'padding': padding}
    how |= {'with_gradient': False, 'of_head': False}

    def one(total: jax.Array, reading: Any) -> tuple[jax.Array, CrossEntropy]:
        x_BTD, target_BT, weight_BT, scale = reading
        sums, _ = _chunked(x_BTD, head_VD, target_BT, weight_BT, None, **how)
        return total + scale * sums.total, sums

    return jax.lax.scan(one, jnp.float32(0), (x_JBTD, target_JBT, weight_JBT, scale_J))


def _forward_all(
    x: Any, head: Any, target: Any, weight: Any, scale: Any, z_loss: float, padding: int
) -> tuple[Any, Any]:
    how: dict[str, Any] = {'z_loss': z_loss, 'padding': padding}
    how |= {'with_gradient': True, 'of_head': head.perturbed}

    def one(carry: Any, reading: Any) -> tuple[Any, Any]:
        total, all_VD = carry
        x_BTD, target_BT, weight_BT, scale = reading
        sums, (dx_BTD, dhead_VD) = _chunked(x_BTD, head.value, target_BT, weight_BT, None, **how)
        if dhead_VD is not None:
            all_VD += scale * dhead_VD
        return (total + scale * sums.total, all_VD), (sums, scale.astype(dx_BTD.dtype) * dx_BTD)

    begin = jnp.float32(0), jnp.zeros_like(head.value) if head.perturbed else None
    readings = x.value, target.value, weight.value, scale.value
    (total, dhead_VD), (sums, dx_JBTD) = jax.lax.scan(one, begin, readings)
    return (total, sums), jax.lax.optimization_barrier((dx_JBTD, dhead_VD))


def _backward_all(z_loss: float, padding: int, gradients: Any, cotangent: Any) -> tuple[Any, ...]:
    dx_JBTD, dhead_VD = gradients
    scale, _ = cotangent
    dhead_VD = None if dhead_VD is None else dhead_VD * scale
    return (dx_JBTD * scale.astype(dx_JBTD.dtype), dhead_VD, None, None, None)


cross_entropies.defvjp(_forward_all, _backward_all, symbolic_zeros=True)


def _chunked(
    x_BTD: Any,
    head_VD: Any,
    target_BT: Any,
    weight_BT: Any,
    never_BT: Any,
    *,
    z_loss: float,
    padding: int,
    with_gradient: bool,
    of_head: bool,
) -> tuple[CrossEntropy, Any]:
    """Each device takes its own rows and its own part of the vocabulary."""
    batch_P, tokens_P, head_P = layout.act('BTD'), layout.act('BT'), layout.param('VD')
    return jax.shard_map(
        functools.partial(
            _local, z_loss=z_loss, padding=padding, with_gradient=with_gradient, of_head=of_head
        ),
        in_specs=(batch_P, head_P, tokens_P, tokens_P, None if never_BT is None else tokens_P),
        out_specs=(
            jax.sharding.PartitionSpec(),
            (batch_P, head_P if of_head else None) if with_gradient else None,
        ),
    )(x_BTD, head_VD, target_BT, weight_BT, never_BT)


def _local(
    x_BTD: Any,
    head_VD: Any,
    target_BT: Any,
    weight_BT: Any,
    never_BT: Any,
    *,
    z_loss: float,
    padding: int,
    with_gradient: bool,
    of_head: bool,
) -> tuple[CrossEntropy, Any]:
    batch, vocab = layout.BATCH_AXES, layout.VOCAB_AXIS
    head_VD = in_use(head_VD, x_BTD.dtype)
    V, D = head_VD.shape
    gather = Gathered.of(weight_BT)

    def step(i: jax.Array, carry: Any) -> Any:
        sums, dx_BTD, dhead_VD = carry
        x_CD, target_C, weight_C = (gather.chunk(x, i) for x in (x_BTD, target_BT, weight_BT))
        logit_CV = logits_of(x_CD, head_VD, padding)
        if never_BT is not None:
            logit_CV = _without(logit_CV, gather.chunk(never_BT, i, fill=-1))
        scores = scored(logit_CV, target_C)
        log_z_C = scores.softmax.log_z_C
        sums = CrossEntropy(
            sums.total + jnp.sum(weight_C * (scores.nll_C + z_loss * jnp.square(log_z_C))),
            sums.nll + jnp.sum(weight_C * scores.nll_C),
            sums.correct + jnp.sum(weight_C * scores.correct_C),
        )
        if not with_gradient:
            return sums, None, None
        dlogit_CV = scores.dlogits(weight_C, z_loss).astype(x_CD.dtype)
        dx_CD = jax.lax.psum(jnp.einsum('CV,VD->CD', dlogit_CV, head_VD), vocab)
        dx_BTD = gather.put(dx_BTD, dx_CD, i)
        if of_head:
            dhead_VD += jnp.einsum('CV,CD->VD', dlogit_CV, x_CD, preferred_element_type=jnp.float32)
        return sums, dx_BTD, dhead_VD

    varying = functools.partial(jax.lax.pcast, to='varying')
    zero = varying(jnp.zeros(()), batch)
    dx_BTD = varying(jnp.zeros(x_BTD.shape, x_BTD.dtype), batch) if with_gradient else None
    dhead_VD = varying(jnp.zeros((V, D)), (*batch, vocab)) if of_head else None
    sums, dx_BTD, dhead_VD = jax.lax.fori_loop(
        0, gather.n, step, (CrossEntropy(zero, zero, zero), dx_BTD, dhead_VD)
    )
    sums = jax.tree.map(lambda value: jax.lax.psum(value, batch), sums)
    if not with_gradient:
        return sums, None
    return sums, (dx_BTD, at_rest(dhead_VD) if of_head else None)


class Gathered(NamedTuple):
    """The tokens of one device whose weight is not 0, in their order, in chunks. How many chunks
    there are is known at run time only, so that none is ever left out."""

    at_N: jax.Array
    """Places of the tokens among all of the device, [chunks x size]; behind the last a place that
    does not exist."""
    n: jax.Array
    """Chunks to compute, int32 []. The same on all devices, for they compute them together."""
    size: int
    """Tokens of a chunk."""

    @classmethod
    def of(cls, weight_BT: jax.Array) -> Gathered:
        tokens = weight_BT.size
        size = min(CHUNK_TOKENS, max(_SMALLEST, -(-tokens // _CHUNKS)), tokens)
        bears_N = weight_BT.reshape(-1) != 0
        most = jax.lax.pmax(jnp.sum(bears_N, dtype=jnp.int32), layout.BATCH_AXES)
        room = -(-tokens // size) * size
        at_N = jnp.flatnonzero(bears_N, size=room, fill_value=tokens)
        return cls(at_N, -(-most // size), size)

    def chunk(self, array: jax.Array, i: jax.Array, fill: int = 0) -> jax.Array:
        """Chunk i of [B, T, ...]: [C, ...], with `fill` where it is not full."""
        flat = array.reshape(-1, *array.shape[2:])
        return flat.at[self._places(i)].get(mode='fill', fill_value=fill)

    def put(self, array: jax.Array, chunk: jax.Array, i: jax.Array) -> jax.Array:
        """[B, T, ...] with chunk i [C, ...] in its places."""
        flat = array.reshape(-1, *array.shape[2:])
        return flat.at[self._places(i)].set(chunk, mode='drop').reshape(array.shape)

    def _places(self, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(self.at_N, i * self.size, self.size)


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


def _without(logit_CV: jax.Array, id_C: jax.Array) -> jax.Array:
    """The logits, -inf for one id of each token."""
    V = logit_CV.shape[1]
    local_C = id_C - jax.lax.axis_index(layout.VOCAB_AXIS) * V
    return jnp.where(local_C[:, None] == jnp.arange(V), -jnp.inf, logit_CV)


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

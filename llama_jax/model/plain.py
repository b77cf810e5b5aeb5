"""Attention in plain jnp: over all keys, by blocks of queries, and over the band that a sparse
pattern leaves."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import layout
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import BlockGlobal, Dense, Dilated, Pattern, Window
from llama_jax.model.quantized import Weight, product

SMALLEST = 64
"""Fewest queries per block."""


def dense(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
) -> jax.Array:
    """Attention with the whole matrix of scores."""
    q_BTKGH = _grouped(q_BTNH, k_BSKH.shape[2])
    score_BKGTS = jnp.einsum(
        'BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    weight_BKGTS = _weights(score_BKGTS, visible, H=q_BTNH.shape[3]).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', weight_BKGTS, v_BSKH)
    return jnp.reshape(out_BTKGH, q_BTNH.shape, out_sharding=layout.act('BTNH'))


def cached(q_BTNH: jax.Array, k_BKHS: Weight, v_BKSH: Weight, visible: Visibility) -> jax.Array:
    """`dense` over a cache, whose keys and values may be quantised."""
    dtype = q_BTNH.dtype
    q_BKGTH = jnp.einsum('BTKGH->BKGTH', _grouped(q_BTNH, k_BKHS.shape[1]))
    score_BKGTS = product('BKGTH,BKHS->BKGTS', q_BKGTH, k_BKHS, dtype=jnp.float32)
    weight_BKGTS = _weights(score_BKGTS, visible, H=q_BTNH.shape[3]).astype(dtype)
    out_BKGTH = product('BKGTS,BKSH->BKGTH', weight_BKGTS, v_BKSH, dtype=dtype)
    out_BTKGH = jnp.einsum('BKGTH->BTKGH', out_BKGTH)
    return jnp.reshape(out_BTKGH, q_BTNH.shape, out_sharding=layout.act('BTNH'))


def _grouped(q_BTNH: jax.Array, K: int) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    return jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=layout.act('BTKGH'))


def _weights(score_BKGTS: jax.Array, visible: Visibility, *, H: int) -> jax.Array:
    mask_BTS = visible.dense()
    score_BKGTS = jnp.where(mask_BTS[:, None, None], score_BKGTS / math.sqrt(H), -jnp.inf)
    return jax.nn.softmax(score_BKGTS, axis=-1)


def blocked(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
) -> jax.Array:
    """Attention by blocks of queries, each over the keys up to its end: about half of the work and
    of the memory of the whole matrix of scores. Heads go in front first, once, as the matrix
    products of a CPU want them.

    Where a query may see what comes after it, only the memory is less.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    block = max(SMALLEST, -(-T // 8))
    mask_BTS = visible.dense()
    q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=layout.act('BTKGH'))
    q_BKGTH = jnp.einsum('BTKGH->BKGTH', q_BTKGH / math.sqrt(H))
    k_BKSH, v_BKSH = (jnp.einsum('BSKH->BKSH', x) for x in (k_BSKH, v_BSKH))

    def attended(start: int) -> jax.Array:
        end = min(start + block, T)
        n_keys = end if visible.one_sided else S
        q_BKGtH = q_BKGTH[:, :, :, start:end]
        out_BKGtH = _softmax(
            *(q_BKGtH, k_BKSH[:, :, :n_keys], v_BKSH[:, :, :n_keys]),
            mask_BTS[:, None, None, start:end, :n_keys],
        )
        return out_BKGtH.astype(q_BTNH.dtype)

    out_BKGTH = jnp.concatenate([attended(start) for start in range(0, T, block)], axis=3)
    out_BTKGH = jnp.einsum('BKGTH->BTKGH', out_BKGTH)
    return jnp.reshape(out_BTKGH, (B, T, N, H), out_sharding=layout.act('BTNH'))


def _softmax(
    q_: jax.Array, k_: jax.Array, v_: jax.Array, mask: jax.Array, *, lead: str = 'BK'
) -> jax.Array:
    """Attention of queries [`lead` G T H], scaled, to keys and values [`lead` S H], float32."""
    score = jnp.einsum(f'{lead}GTH,{lead}SH->{lead}GTS', q_, k_, preferred_element_type=jnp.float32)
    score = jnp.where(mask, score, -jnp.inf)
    # Normalised after the product with the values, on H numbers per query instead of S.
    top = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
    weight = jnp.exp(score - top)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    out = jnp.einsum(
        f'{lead}GTS,{lead}SH->{lead}GTH',
        weight.astype(v_.dtype),
        v_,
        preferred_element_type=jnp.float32,
    )
    return out / total


class _Band(NamedTuple):
    """How a row is cut for a pattern: into lanes of every `lanes`-th token, these into chunks of
    `chunk` tokens. A query needs the keys of its own chunk, `before` chunks and `after` chunks."""

    lanes: int
    chunk: int
    before: int
    after: int
    n_global: int = 0


def _band(pattern: Pattern, length: int, *, one_sided: bool) -> _Band:
    if isinstance(pattern, BlockGlobal):
        return _Band(1, pattern.block, 0, 0, min(pattern.n_global, length))
    assert isinstance(pattern, Window | Dilated), pattern
    lanes = pattern.dilation if isinstance(pattern, Dilated) else 1
    lane, reach = -(-length // lanes), pattern.size - 1
    # Small chunks meet few keys in vain, and copy each key for many chunks: half a window.
    chunk = min(max(SMALLEST, -(-pattern.size // 2)), lane)
    neighbours = min(-(-reach // chunk), -(-lane // chunk) - 1)
    return _Band(lanes, chunk, neighbours, 0 if one_sided else neighbours)


def is_sparse(visible: Visibility, length: int) -> bool:
    """Whether `banded` multiplies fewer queries and keys than `blocked` for rows of `length`."""
    if visible.pattern == Dense():
        return False
    band = _band(visible.pattern, length, one_sided=visible.one_sided)
    keys = band.chunk * (band.before + 1 + band.after) + band.n_global
    queries = -(-length // (band.lanes * band.chunk)) * band.lanes * band.chunk
    return keys * queries < length**2 * (9 / 16 if visible.one_sided else 1)


def banded(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
) -> jax.Array:
    """Attention under a sparse pattern by one batched product of chunks of queries with the keys
    around them: work and memory linear in the length. Knows nothing of a mesh.

    Letters here: R lanes, C chunks, T queries of a chunk, S the keys that they need.
    """
    (B, length, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    band = _band(visible.pattern, length, one_sided=visible.one_sided)
    R, T = band.lanes, band.chunk
    C = -(-length // (R * T))

    def cut(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
        """The dimension of length at `axis` -> R, C, T."""
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, R * C * T - length)
        x = jnp.pad(x, pad, constant_values=fill)
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = jnp.moveaxis(x.reshape(*before, C * T, R, *after), axis + 1, axis)
        return x.reshape(*before, R, C, T, *after)

    def around(
        x: jax.Array, axis: int, fill: int = 0, everywhere: jax.Array | None = None
    ) -> jax.Array:
        """Of each chunk the keys that its queries need: C, T at `axis` -> C, S; then the global
        ones, `everywhere`, which begin the row."""
        pad = [(0, 0)] * x.ndim
        pad[axis] = (band.before, band.after)
        padded = jnp.pad(x, pad, constant_values=fill)
        parts = [
            jax.lax.slice_in_dim(padded, i, i + C, axis=axis)
            for i in range(band.before + band.after + 1)
        ]
        if everywhere is not None:
            shape = [*x.shape]
            shape[axis + 1] = band.n_global
            parts.append(jnp.broadcast_to(jnp.expand_dims(everywhere, (axis - 1, axis)), shape))
        return jnp.concatenate(parts, axis=axis + 1)

    q_BTKGH = q_BTNH.reshape(B, length, K, N // K, H) / math.sqrt(H)
    q_BKLGH = jnp.einsum('BTKGH->BKTGH', q_BTKGH)
    k_BKLH, v_BKLH = (jnp.einsum('BSKH->BKSH', x) for x in (k_BSKH, v_BSKH))
    segment_BL, n_global = visible.key_segment_BS, band.n_global
    place_L = jnp.arange(length)

    # What pads the end sees itself, so that no query is without a key; nothing sees what stands
    # before the beginning or after the end.
    PAD, NOWHERE = -1, -2
    query_segment_BRCT = cut(visible.query_segment_BT, 1, PAD)
    query_place_RCT = cut(place_L, 0, length)
    shared = n_global > 0
    first = slice(0, n_global)
    key_segment_BRCS = around(
        cut(segment_BL, 1, PAD), 2, NOWHERE, segment_BL[:, first] if shared else None
    )
    key_place_RCS = around(cut(place_L, 0, length), 1, 0, place_L[first] if shared else None)
    seen = query_segment_BRCT[..., None] == key_segment_BRCS[..., None, :]
    query, key = query_place_RCT[..., None], key_place_RCS[..., None, :]
    if visible.causal:
        before = query >= key
        if visible.prefix_BS is not None:
            prefix_BL = (visible.prefix_BS != 0).astype(jnp.int32)
            prefix_BRCS = around(cut(prefix_BL, 1), 2, 0, prefix_BL[:, first] if shared else None)
            before = before | (prefix_BRCS[..., None, :] != 0)
        seen &= before
    allowed = visible.pattern.allows(query, key)
    if shared:
        # Global keys stand in their own block as well: there they are not counted twice.
        again = jnp.arange(key.shape[-1]) >= T
        allowed &= ~(again & (query // T == key // T))
    seen &= allowed

    out = _softmax(
        jnp.moveaxis(cut(q_BKLGH, 2), 5, 4),
        around(cut(k_BKLH, 2), 3, 0, k_BKLH[:, :, first] if shared else None),
        around(cut(v_BKLH, 2), 3, 0, v_BKLH[:, :, first] if shared else None),
        seen[:, None, :, :, None],
        lead='BKRC',
    )
    # [B, K, R, C, G, T, H] -> [B, length, N, H]
    out = out.transpose(0, 3, 5, 2, 1, 4, 6).reshape(B, C * T * R, N, H)[:, :length]
    out = out.astype(q_BTNH.dtype)
    if shared and not visible.one_sided:
        out = out.at[:, first].set(_global_queries(q_BKLGH[:, :, first], k_BKLH, v_BKLH, visible))
    return out


def _global_queries(
    q_BKTGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible: Visibility
) -> jax.Array:
    """The few queries at the beginning of a row that a pattern lets see all of it."""
    B, K, T, G, H = q_BKTGH.shape
    few = Visibility(
        *(visible.query_segment_BT[:, :T], visible.key_segment_BS),
        prefix_BS=visible.prefix_BS,
        causal=visible.causal,
    )
    out_BKGTH = _softmax(jnp.moveaxis(q_BKTGH, 3, 2), k_BKSH, v_BKSH, few.dense()[:, None, None])
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H).astype(q_BKTGH.dtype)

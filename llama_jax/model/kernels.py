"""Attention through one signature, by a named backend.

A backend computes softmax(q k^T / sqrt(H)) v under a Visibility, or refuses: none silently ignores
segments or falls back to another. `auto` chooses by device and shape; every choice is logged once.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.mesh import platform_in_use
from llama_jax.model.config import AttentionBackend
from llama_jax.model.masks import Visibility

log = logging.getLogger(__name__)

_Backend = Callable[[jax.Array, jax.Array, jax.Array, Visibility], jax.Array]


def attend(
    q_BTNH: Float[Array, 'B T N H'],
    k_BSKH: Float[Array, 'B S K H'],
    v_BSKH: Float[Array, 'B S K H'],
    *,
    visible: Visibility,
    backend: AttentionBackend,
) -> Float[Array, 'B T N H']:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with grouped keys and values.

    Raises UserError when `backend` cannot run here or cannot honour the mask.
    """
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    platform = platform_in_use()
    if backend == 'auto':
        backend = _choose(platform, T, S, H, q_BTNH.dtype.name)
    _refuse(backend, platform, T, S, H, q_BTNH.dtype.name)
    _log_once(backend, platform, T, S)
    return _BACKENDS[backend](q_BTNH, k_BSKH, v_BSKH, visible)


def attend_cached(
    q_BTNH: Float[Array, 'B T N H'],
    k_BKHS: Float[Array, 'B K H S'],
    v_BKSH: Float[Array, 'B K S H'],
    *,
    visible: Visibility,
    backend: AttentionBackend,
) -> Float[Array, 'B T N H']:
    """`attend` over a cache, which keeps keys and values as a matrix product reads them."""
    T, S, H = q_BTNH.shape[1], v_BKSH.shape[2], q_BTNH.shape[3]
    platform = platform_in_use()
    if backend == 'auto':
        backend = _choose(platform, T, S, H, q_BTNH.dtype.name)
    if backend in ('reference', 'blocked'):  # no key of a cache is skipped before it is written
        _log_once('reference, cached', platform, T, S)
        return _dense(q_BTNH, k_BKHS, v_BKSH, visible, k='BKHS', v='BKSH')
    k_BSKH = jnp.einsum('BKHS->BSKH', k_BKHS)
    v_BSKH = jnp.einsum('BKSH->BSKH', v_BKSH)
    return attend(q_BTNH, k_BSKH, v_BSKH, visible=visible, backend=backend)


def _choose(platform: str, T: int, S: int, H: int, dtype: str) -> AttentionBackend:
    if platform == 'tpu' and not _splash_problem(T, S):
        return 'splash'
    if platform == 'gpu' and not _cudnn_problem(T, S, H, dtype):
        return 'cudnn'
    return 'reference' if _blocked_problem(T, S) else 'blocked'


def _refuse(backend: str, platform: str, T: int, S: int, H: int, dtype: str) -> None:
    problem = None
    if backend == 'cudnn':
        problem = 'this device is no GPU' if platform != 'gpu' else _cudnn_problem(T, S, H, dtype)
    elif backend == 'blocked':
        problem = _blocked_problem(T, S)
    elif backend == 'splash':
        problem = 'this device is no TPU' if platform == 'gpu' else _splash_problem(T, S)
    if problem:
        raise UserError(
            f'attention backend {backend!r} cannot be used: {problem}; use auto, xla or reference'
        )


def _cudnn_problem(T: int, S: int, H: int, dtype: str) -> str | None:
    if dtype not in ('bfloat16', 'float16'):
        return f'cuDNN attention needs bfloat16, not {dtype}'
    if H > 128 or H % 8:
        return f'cuDNN attention needs a head dimension of 8..128 in eights, not {H}'
    if T % 2 or S % 2:
        return f'cuDNN attention needs even lengths, not {T} queries over {S} keys'
    return None


def _blocked_problem(T: int, S: int) -> str | None:
    if T != S:
        return f'blocks skip later keys of whole sequences, not {T} queries over {S} cached keys'
    return None


def _splash_problem(T: int, S: int) -> str | None:
    if T != S:
        return f'splash attends over whole sequences, not {T} queries over {S} cached keys'
    return f'splash needs a sequence in multiples of 128, not {T}' if T % 128 else None


@functools.lru_cache
def _log_once(backend: str, platform: str, T: int, S: int) -> None:
    log.info('attention: backend %s on %s, %d queries over %d keys', backend, platform, T, S)


def _reference(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
) -> jax.Array:
    return _dense(q_BTNH, k_BSKH, v_BSKH, visible, k='BSKH', v='BSKH')


def _dense(
    q_BTNH: jax.Array, k_: jax.Array, v_: jax.Array, visible: Visibility, *, k: str, v: str
) -> jax.Array:
    """Attention with the whole matrix of scores; `k` and `v` are the letters of keys and values."""
    B, T, N, H = q_BTNH.shape
    K = k_.shape[k.index('K')]
    q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=layout.act('BTKGH'))
    score_BKGTS = jnp.einsum(f'BTKGH,{k}->BKGTS', q_BTKGH, k_, preferred_element_type=jnp.float32)
    mask_BTS = visible.dense()
    score_BKGTS = jnp.where(mask_BTS[:, None, None], score_BKGTS / math.sqrt(H), -jnp.inf)
    weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_.dtype)
    out_BTKGH = jnp.einsum(f'BKGTS,{v}->BTKGH', weight_BKGTS, v_)
    return jnp.reshape(out_BTKGH, (B, T, N, H), out_sharding=layout.act('BTNH'))


def _blocked(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
) -> jax.Array:
    """Attention by blocks of queries, each over the keys up to its end: about half of the work and
    of the memory of the whole matrix of scores. Heads go in front first, once, as the matrix
    products of a CPU want them."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    block = max(64, -(-T // 8))
    mask_BTS = visible.dense()
    q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=layout.act('BTKGH'))
    q_BKGTH = jnp.einsum('BTKGH->BKGTH', q_BTKGH / math.sqrt(H))
    k_BKSH, v_BKSH = (jnp.einsum('BSKH->BKSH', x) for x in (k_BSKH, v_BSKH))

    def attended(start: int) -> jax.Array:
        end = min(start + block, T)
        score_BKGTS = jnp.einsum(
            'BKGTH,BKSH->BKGTS',
            q_BKGTH[:, :, :, start:end],
            k_BKSH[:, :, :end],
            preferred_element_type=jnp.float32,
        )
        mask_B11TS = mask_BTS[:, None, None, start:end, :end]
        score_BKGTS = jnp.where(mask_B11TS, score_BKGTS, -jnp.inf)
        # Normalised after the product with the values, on H numbers per query instead of S.
        top_BKGT1 = jax.lax.stop_gradient(jnp.max(score_BKGTS, axis=-1, keepdims=True))
        weight_BKGTS = jnp.exp(score_BKGTS - top_BKGT1)
        total_BKGT1 = jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
        out_BKGTH = jnp.einsum(
            'BKGTS,BKSH->BKGTH',
            weight_BKGTS.astype(v_BKSH.dtype),
            v_BKSH[:, :, :end],
            preferred_element_type=jnp.float32,
        )
        return (out_BKGTH / total_BKGT1).astype(q_BTNH.dtype)

    out_BKGTH = jnp.concatenate([attended(start) for start in range(0, T, block)], axis=3)
    out_BTKGH = jnp.einsum('BKGTH->BTKGH', out_BKGTH)
    return jnp.reshape(out_BTKGH, (B, T, N, H), out_sharding=layout.act('BTNH'))


def _library(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visible: Visibility,
    *,
    implementation: Literal['xla', 'cudnn'],
) -> jax.Array:
    # The mask is given whole: `is_causal` is aligned to the top left, wrong with a cache, and
    # sequence lengths cannot tell packed documents apart.
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=visible.dense()[:, None], implementation=implementation
    )


def _splash(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
) -> jax.Array:
    """The TPU's block-sparse flash attention; on a CPU it is interpreted, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as sm

    (T, N, H), K = q_BTNH.shape[1:], k_BSKH.shape[2]
    block = math.gcd(T, 512)
    kernel = sk.make_splash_mqa_single_device(
        sm.MultiHeadMask([sm.CausalMask((T, T)) for _ in range(N // K)]),
        block_sizes=sk.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        interpret=platform_in_use() == 'cpu',
    )
    q_BKGTH = jnp.einsum('BTNH->BNTH', q_BTNH / math.sqrt(H)).reshape(-1, K, N // K, T, H)
    k_BKSH, v_BKSH = (jnp.einsum('BSKH->BKSH', x) for x in (k_BSKH, v_BSKH))
    per_group = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    per_row = jax.vmap(per_group, in_axes=(0, 0, 0, 0))
    segments = sk.SegmentIds(visible.query_segment_BT, visible.key_segment_BS)
    out_BKGTH = per_row(q_BKGTH, k_BKSH, v_BKSH, segments)
    return jnp.einsum('BNTH->BTNH', out_BKGTH.reshape(-1, N, T, H)).astype(q_BTNH.dtype)


def _per_device(backend: _Backend) -> _Backend:
    """`backend` on each device's own rows and heads: fused kernels know nothing of a mesh."""

    def local(
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        query_BT: jax.Array,
        key_BS: jax.Array,
        start: jax.Array,
    ) -> jax.Array:
        return backend(q_BTNH, k_BSKH, v_BSKH, Visibility(query_BT, key_BS, start))

    def whole(
        q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
    ) -> jax.Array:
        return jax.shard_map(
            local,
            in_specs=tuple(map(layout.act, ('BTNH', 'BSKH', 'BSKH', 'BT', 'BS', ''))),
            out_specs=layout.act('BTNH'),
            check_vma=False,  # a fused call does not say over which axes its result varies
        )(
            *(q_BTNH, k_BSKH, v_BSKH, visible.query_segment_BT, visible.key_segment_BS),
            jnp.asarray(visible.query_start),
        )

    return whole


_BACKENDS: dict[str, _Backend] = {
    'reference': _reference,
    'blocked': _blocked,
    'xla': functools.partial(_library, implementation='xla'),
    'cudnn': _per_device(functools.partial(_library, implementation='cudnn')),
    'splash': _per_device(_splash),
}

"""Attention through one signature, by a named backend.

A backend computes softmax(q k^T / sqrt(H)) v under a Visibility, or refuses: none silently ignores
segments, a prefix or a pattern, or falls back to another. `auto` chooses by device, shape and what
is seen; every choice is logged once.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.mesh import platform_in_use
from llama_jax.model import patterns, plain
from llama_jax.model.config import AttentionBackend
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import Dense, Window
from llama_jax.model.quantized import Quantized, Weight, dense

log = logging.getLogger(__name__)

_FEW = 16
"""Queries for which other backends would turn a whole cache around."""
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
    platform, H, dtype = platform_in_use(), q_BTNH.shape[3], q_BTNH.dtype.name
    if backend == 'auto':
        backend = _choose(platform, visible, H, dtype)
    problem = _problem(backend, platform, visible, H, dtype)
    if problem:
        raise UserError(
            f'attention backend {backend!r} cannot be used: {problem}; use auto, xla or reference'
        )
    _log_once(backend, platform, q_BTNH.shape[1], k_BSKH.shape[1])
    return _BACKENDS[backend](q_BTNH, k_BSKH, v_BSKH, visible)


def attend_cached(
    q_BTNH: Float[Array, 'B T N H'],
    k_BKHS: Weight,
    v_BKSH: Weight,
    *,
    visible: Visibility,
    backend: AttentionBackend,
) -> Float[Array, 'B T N H']:
    """`attend` over a cache, which keeps keys and values as a matrix product reads them."""
    platform, H, dtype = platform_in_use(), q_BTNH.shape[3], q_BTNH.dtype.name
    if backend == 'auto':
        as_it_lies = q_BTNH.shape[1] < _FEW or isinstance(k_BKHS, Quantized)
        backend = 'reference' if as_it_lies else _choose(platform, visible, H, dtype)
    if backend in ('reference', 'blocked'):  # no key of a cache is skipped before it is written
        _log_once('reference, cached', platform, q_BTNH.shape[1], v_BKSH.shape[2])
        return plain.cached(q_BTNH, k_BKHS, v_BKSH, visible)
    k_BSKH = jnp.einsum('BKHS->BSKH', dense(k_BKHS, q_BTNH.dtype))
    v_BSKH = jnp.einsum('BKSH->BSKH', dense(v_BKSH, q_BTNH.dtype))
    return attend(q_BTNH, k_BSKH, v_BSKH, visible=visible, backend=backend)


def _choose(platform: str, visible: Visibility, H: int, dtype: str) -> AttentionBackend:
    def fits(backend: AttentionBackend) -> bool:
        return _problem(backend, platform, visible, H, dtype) is None

    sparse = visible.pattern != Dense()
    if platform == 'tpu' and fits('splash'):
        return 'splash'
    # Under a mask cuDNN computes every score, which a band of plain products need not.
    if platform == 'gpu' and fits('cudnn') and not (sparse and _without_mask(visible) is None):
        return 'cudnn'
    return 'blocked' if fits('blocked') else 'reference'


def _problem(backend: str, platform: str, visible: Visibility, H: int, dtype: str) -> str | None:
    """Why `backend` cannot be used here, or None."""
    T, S = visible.query_segment_BT.shape[1], visible.key_segment_BS.shape[1]
    if backend == 'cudnn':
        return 'this device is no GPU' if platform != 'gpu' else _cudnn_problem(T, S, H, dtype)
    if backend == 'blocked':
        return _blocked_problem(visible, T, S)
    if backend == 'splash':
        return 'this device is no TPU' if platform == 'gpu' else _splash_problem(visible, T, S)
    return None


def _cudnn_problem(T: int, S: int, H: int, dtype: str) -> str | None:
    if dtype not in ('bfloat16', 'float16'):
        return f'cuDNN attention needs bfloat16, not {dtype}'
    if H > 128 or H % 8:
        return f'cuDNN attention needs a head dimension of 8..128 in eights, not {H}'
    if T % 2 or S % 2:
        return f'cuDNN attention needs even lengths, not {T} queries over {S} keys'
    return None


def _blocked_problem(visible: Visibility, T: int, S: int) -> str | None:
    if visible.key_place_BS is not None and (T != S or visible.pattern != Dense()):
        return 'a cache holds keys at places that are not known in advance'
    if T != S and (visible.causal or visible.pattern != Dense()):
        return f'blocks skip later keys of whole sequences, not {T} queries over {S} keys'
    return None


def _splash_problem(visible: Visibility, T: int, S: int) -> str | None:
    if visible.key_place_BS is not None:
        return 'a cache holds keys at places that are not known in advance'
    if T != S and visible.causal:
        return f'splash attends over whole sequences, not {T} queries over {S} keys'
    for length in (T, S):
        if length % 128:
            return f'splash needs a sequence in multiples of 128, not {length}'
    if visible.prefix_BS is not None:
        return 'splash has to know in advance what is seen, and a prefix ends where the data says'
    return None


@functools.lru_cache
def _log_once(backend: str, platform: str, T: int, S: int) -> None:
    log.info('attention: backend %s on %s, %d queries over %d keys', backend, platform, T, S)


def _blocked(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
) -> jax.Array:
    if plain.is_sparse(visible, q_BTNH.shape[1]):
        return _per_device(plain.banded)(q_BTNH, k_BSKH, v_BSKH, visible)
    return plain.blocked(q_BTNH, k_BSKH, v_BSKH, visible)


def _without_mask(visible: Visibility) -> dict[str, Any] | None:
    """Arguments of the library that say what is seen without a mask, where they can."""
    told = (visible.prefix_BS, visible.key_place_BS, visible.until_BS)
    if not visible.whole or any(array is not None for array in told):
        return None
    if visible.pattern == Dense():
        return {'is_causal': visible.causal}
    if isinstance(visible.pattern, Window) and visible.causal:
        # cuDNN has a window to the left only.
        return {'is_causal': True, 'local_window_size': (visible.pattern.size - 1, 0)}
    return None


def _library(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visible: Visibility,
    *,
    implementation: Literal['xla', 'cudnn'],
) -> jax.Array:
    # As a rule the mask is given whole: `is_causal` is aligned to the top left, wrong with a cache,
    # and sequence lengths cannot tell packed documents apart.
    seen = _without_mask(visible)
    if seen is None:
        seen = {'mask': visible.dense()[:, None]}
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, implementation=implementation, **seen
    )


def _splash(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
) -> jax.Array:
    """The TPU's block-sparse flash attention; on a CPU it is interpreted, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as sm

    (T, N, H), (S, K) = q_BTNH.shape[1:], k_BSKH.shape[1:3]
    block_q, block_kv = math.gcd(T, 512), math.gcd(S, 512)
    mask: sm.Mask
    if visible.pattern == Dense():
        mask = sm.CausalMask((T, S)) if visible.causal else sm.FullMask((T, S))
    elif isinstance(visible.pattern, Window):
        reach = visible.pattern.size - 1
        mask = sm.LocalMask((T, S), (reach, 0 if visible.causal else reach), 0)
    else:
        mask = sm.NumpyMask(patterns.mask(visible.pattern, T, S, causal=visible.causal))
    kernel = sk.make_splash_mqa_single_device(
        sm.MultiHeadMask([mask] * (N // K)),
        block_sizes=sk.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=block_kv,
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

    def whole(
        q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visibility
    ) -> jax.Array:
        specs: dict[str, Any] = {
            name: None if getattr(visible, name) is None else layout.act(name.rsplit('_', 1)[1])
            for name in (
                *('query_segment_BT', 'query_place_BT'),
                *('key_segment_BS', 'key_place_BS', 'prefix_BS', 'until_BS'),
            )
        }
        return jax.shard_map(
            backend,
            in_specs=(*map(layout.act, ('BTNH', 'BSKH', 'BSKH')), replace(visible, **specs)),
            out_specs=layout.act('BTNH'),
            check_vma=False,  # a fused call does not say over which axes its result varies
        )(q_BTNH, k_BSKH, v_BSKH, visible)

    return whole


_BACKENDS: dict[str, _Backend] = {
    'reference': plain.dense,
    'blocked': _blocked,
    'xla': functools.partial(_library, implementation='xla'),
    'cudnn': _per_device(functools.partial(_library, implementation='cudnn')),
    'splash': _per_device(_splash),
}

"""The LLaMA decoder on a CPU: weights first, a column for each token.

The same function as model/transformer.py for a model of the LLaMA family (`ModelConfig.llama`), in
the order of operands that a CPU is fast at: weights lie with their outputs first, and multiply
activations [D, B, T]. A product with few columns then reads its weight at the speed of memory. The
order of training, x [B, T, D] times w [D, F], reads it at 0.8 of that speed for one row, and at
half of it for 2 to 8 rows; with 64 columns it takes a sixth longer (XLA:CPU of jax 0.10.2, 2
cores). Small products cost more than their share: query, key and value are one, gate and up too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax import layout, precision
from llama_jax.generate.recipe import alone, together, turned
from llama_jax.model import kernels
from llama_jax.model.adapted import product
from llama_jax.model.cache import Cache, LayerCache
from llama_jax.model.config import Compute, ModelConfig, by_length
from llama_jax.model.layers import HEADS, Params
from llama_jax.model.masks import Visibility
from llama_jax.model.quantized import rows
from llama_jax.model.rope import rotate_pairs, rotation_of
from llama_jax.model.transformer import without_padding

LONGEST_TABLE = 2**17
"""Positions whose cosines and sines are kept: 67 MB with heads of 128."""


def arrange(params: Params, config: ModelConfig) -> Params:
    """Parameters with layers apart, as `features` takes them: a tree of Joined. The letter J is of
    parts that lie together: the queries of a group, its key and its value; gate and up."""
    N, K = config.heads, config.kv_heads
    by_group = functools.partial(_by_group, K)

    def arranged(block: Params) -> Params:
        attention, mlp = block['attention'], block['mlp']
        qkv = tuple(attention[name] for name in ('q_DNH', 'k_DKH', 'v_DKH'))
        gate_up = mlp['gate_DF'], mlp['up_DF']
        return {
            'attention_norm': alone(block['attention_norm']),
            'attention': {
                'qkv_KJHD': together(
                    'qkv_KJHD', qkv, _join_heads, outputs=by_group, sizes=(N // K, 1, 1)
                ),
                'out_DNH': turned('out_DNH', attention['out_NHD'], _last_first),
            },
            'mlp_norm': alone(block['mlp_norm']),
            'mlp': {
                'gate_up_JFD': together(
                    'gate_up_JFD',
                    gate_up,
                    _transposed,
                    outputs=lambda b_RF: b_RF.T[None],
                    sizes=(1, 1),
                ),
                'down_DF': turned('down_DF', mlp['down_FD'], _last_first),
            },
        }

    rest = {name: value for name, value in params.items() if name not in ('blocks', HEADS)}
    blocks = [arranged(block) for block in params['blocks']]
    beside = {number: arranged(block) for number, block in params.get(HEADS, {}).items()}
    return {**alone(rest), 'blocks': blocks, **({HEADS: beside} if beside else {})}


def tables(config: ModelConfig) -> Params:
    """Cosines and sines of all positions, which join the parameters: left to a program, XLA
    computes them in every layer again."""
    if config.context > LONGEST_TABLE or by_length(config.rope_scaling):
        return {}
    rope = rotation_of(config, jnp.arange(config.context)[None])
    return {'rope': {'cos_CH': rope.cos_BTH[0, :, 0], 'sin_CH': rope.sin_BTH[0, :, 0]}}


def _join_heads(q_DNH: Any, k_DKH: Any, v_DKH: Any) -> Any:
    D, K, H = k_DKH.shape
    parts = [q_DNH.reshape(D, K, -1, H), k_DKH[:, :, None], v_DKH[:, :, None]]
    if isinstance(q_DNH, np.ndarray):
        return np.concatenate(_of_one_type(parts), axis=2).transpose(1, 2, 3, 0)
    parts = [jax.reshard(x, layout.act('DKJH')) for x in parts]  # at rest K may lie whole
    return jnp.concatenate(parts, axis=2).transpose(1, 2, 3, 0)


def _by_group(K: int, b_RNH: Any) -> Any:
    """What an adapter adds to heads [R, N, H], of queries, keys or values: [K, J, H, R]."""
    R, _, H = b_RNH.shape
    b_RKJH = b_RNH.reshape(R, K, -1, H)
    if not isinstance(b_RNH, np.ndarray):
        b_RKJH = jax.reshard(b_RKJH, layout.act('RKJH'))
    return b_RKJH.transpose(1, 2, 3, 0)


def _transposed(*parts: Any) -> Any:
    """Side by side, with their last dimension first."""
    if isinstance(parts[0], np.ndarray):
        return np.stack([x.T for x in _of_one_type(parts)])
    return jnp.stack([x.T for x in parts])


def _of_one_type(parts: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Files may mix types, and numpy knows of no common one of float16 and bfloat16."""
    if len({x.dtype for x in parts}) == 1:
        return parts
    return [x.astype(np.float32) for x in parts]


def _last_first(w: Any) -> Any:
    return w.transpose(w.ndim - 1, *range(w.ndim - 1))


def features(
    config: ModelConfig,
    params: Params,
    token_BT: Int[Array, 'B T'],
    *,
    cache: Cache | None,
    at_B: Int[Array, ' B'] | None,
    length_B: Int[Array, ' B'] | None = None,
    position_BT: Int[Array, 'B T'] | None = None,
    until_BS: Int[Array, 'B S'] | None = None,
    segment_BT: Int[Array, 'B T'] | None = None,
    causal: bool = True,
    compute: Compute,
    beside: Params,
) -> tuple[Float[Array, 'J B T D'], Cache | None]:
    """As those of a Transformer: T more tokens of each row, one document or a tree of texts, from
    place `at_B` on; None: the first. `params` arranged. Behind the features of the model are those
    of the heads `beside` its last layer."""
    B, T = token_BT.shape
    start = 0 if at_B is None else at_B[:, None]
    place_BT = position_BT
    if place_BT is None:
        place_BT = jnp.broadcast_to(start + jnp.arange(T), (B, T))
    if cache is None or at_B is None:
        whole = segment_BT is None
        segment_BT = jnp.ones_like(token_BT) if segment_BT is None else segment_BT
        segment_BT = jax.reshard(segment_BT, layout.act('BT'))
        visible = Visibility(
            *(segment_BT, segment_BT), causal=causal, pattern=config.pattern, whole=whole
        )
    else:
        visible = cache.visible(at_B, T, pattern=config.pattern, until_BS=until_BS)
    place_BT = jax.reshard(place_BT, layout.act('BT'))
    if 'rope' in params:
        tables = (params['rope'][name] for name in ('cos_CH', 'sin_CH'))
        rope_BTH = [x_CH.at[place_BT].get(out_sharding=layout.act('BTH')) for x_CH in tables]
    else:
        length_B = length_B if cache is None else cache.length_B
        rope = rotation_of(config, place_BT, length_B=length_B)
        # Not in every layer again, as XLA would.
        rope_BTH = [jax.lax.optimization_barrier(x_BTNH[:, :, 0]) for x_BTNH in rope]
    cos_HBT, sin_HBT = (jnp.einsum('BTH->HBT', x_BTH) for x_BTH in rope_BTH)
    dtype = precision.dtype(compute.precision)
    token_BT = jax.reshard(token_BT, layout.act('BT'))
    x_DBT = jnp.einsum('BTD->DBT', rows(params['embed_VD'], token_BT, letters='BTD', dtype=dtype))
    layer = jax.jit(functools.partial(_layer, config, compute))  # traced once for all layers
    written, outputs, trunk_DBT = [], [], x_DBT
    last = len(params['blocks']) - 1
    for i, block in enumerate([*params['blocks'], *(beside[j] for j in sorted(beside, key=int))]):
        kept = None if cache is None else cache.layers[i]
        trunk_DBT = x_DBT if i <= last else trunk_DBT
        x_DBT, kept = layer(block, trunk_DBT, kept, at_B, cos_HBT, sin_HBT, visible)
        written.append(kept)
        if i >= last:
            outputs.append(_norm(x_DBT, params['norm']['scale_D'], config.norm_eps))
    x_JBTD = jnp.stack([jnp.einsum('DBT->BTD', x_DBT) for x_DBT in outputs])
    return x_JBTD, cache and replace(cache, layers=written)


def _layer(
    config: ModelConfig,
    compute: Compute,
    block: Params,
    x_DBT: jax.Array,
    kept: LayerCache | None,
    at_B: jax.Array | None,
    cos_HBT: jax.Array,
    sin_HBT: jax.Array,
    visible: Visibility,
) -> tuple[jax.Array, LayerCache | None]:
    dtype, backend = x_DBT.dtype, compute.attention
    h_DBT = _norm(x_DBT, block['attention_norm']['scale_D'], config.norm_eps)
    w = block['attention']
    qkv_KJHBT = product('KJHD,DBT->KJHBT', w['qkv_KJHD'], h_DBT, dtype=dtype)
    qk_KJHBT = rotate_pairs(qkv_KJHBT[:, :-1], cos_HBT, sin_HBT, axis=2)
    q_BTNH = _heads(qk_KJHBT[:, :-1])
    k_BTKH = jnp.einsum('KHBT->BTKH', qk_KJHBT[:, -1])
    v_BTKH = jnp.einsum('KHBT->BTKH', qkv_KJHBT[:, -1])
    if kept is not None:
        kept = kept.write(k_BTKH, v_BTKH, at_B=at_B, pattern=config.pattern)
    if kept is None or at_B is None:
        attended_BTNH = kernels.attend(q_BTNH, k_BTKH, v_BTKH, visible=visible, backend=backend)
    else:
        attended_BTNH = kept.attend(q_BTNH, visible=visible, backend=backend)
    attended_NHBT = jnp.einsum('BTNH->NHBT', attended_BTNH)
    x_DBT += product('DNH,NHBT->DBT', w['out_DNH'], attended_NHBT, dtype=dtype)

    h_DBT = _norm(x_DBT, block['mlp_norm']['scale_D'], config.norm_eps)
    w = block['mlp']
    gate_up_JFBT = product('JFD,DBT->JFBT', w['gate_up_JFD'], h_DBT, dtype=dtype)
    hidden_FBT = jax.nn.silu(gate_up_JFBT[0]) * gate_up_JFBT[1]
    return x_DBT + product('DF,FBT->DBT', w['down_DF'], hidden_FBT, dtype=dtype), kept


def logits(
    config: ModelConfig, params: Params, x_BTD: Float[Array, 'B T D']
) -> Float[Array, 'B T V']:
    """Float32 logits of `features`."""
    head_VD = params['embed_VD'] if config.tied else params['head_VD']
    x_DBT = jnp.einsum('BTD->DBT', x_BTD)
    logits_VBT = product('VD,DBT->VBT', head_VD, x_DBT, dtype=jnp.float32)
    # Or XLA moves the transposition into the product, and computes that in the slow order.
    logits_VBT = jax.lax.optimization_barrier(logits_VBT)
    return without_padding(config, jnp.einsum('VBT->BTV', logits_VBT))


def _heads(q_KGHBT: jax.Array) -> jax.Array:
    K, G, H, B, T = q_KGHBT.shape
    q_BTKGH = jnp.einsum('KGHBT->BTKGH', q_KGHBT)
    return jnp.reshape(q_BTKGH, (B, T, K * G, H), out_sharding=layout.act('BTNH'))


def _norm(x_DBT: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    x_f32 = x_DBT.astype(jnp.float32)
    square_BT = jnp.mean(jnp.square(x_f32), axis=0)
    return (x_f32 * jax.lax.rsqrt(square_BT + eps)).astype(x_DBT.dtype) * scale_D[:, None, None]

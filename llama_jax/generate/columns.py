"""One step of decoding on a CPU: weights first, a column for each token.

The same function as model/transformer.py for a model of the LLaMA family (`ModelConfig.llama`), in
the order of operands that a CPU is fast at: weights lie with their outputs first, and multiply
activations [D, B, T]. A product with few columns then reads its weight at the speed of memory. The
order of training, x [B, T, D] times w [D, F], reads it at 0.8 of that speed for one row, and at
half of it for 2 to 8 rows (XLA:CPU of jax 0.10.2, 2 cores).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import precision
from llama_jax.model import kernels
from llama_jax.model.cache import Cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.quantized import Weight, product, rows
from llama_jax.model.rope import rotate, rotation


def turn(params: Params) -> Params:
    """The matrices of unstacked blocks with D moved from their first place to the last, or from the
    last to the first, and renamed so. Twice is the identity; inside a compiled program the second
    time costs nothing."""

    def turned(tree: Params) -> Params:
        found = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                found[name] = turned(value)
            elif value.ndim < 2:
                found[name] = value
            else:
                stem, letters = name.rsplit('_', 1)
                from_first = letters[0] == 'D'
                order = (
                    (*range(1, value.ndim), 0)
                    if from_first
                    else (value.ndim - 1, *range(value.ndim - 1))
                )
                found[f'{stem}_' + ''.join(letters[i] for i in order)] = value.transpose(order)
        return found

    return {**params, 'blocks': [turned(block) for block in params['blocks']]}


def step(
    config: ModelConfig,
    params: Params,
    token_BT: Int[Array, 'B T'],
    at_B: Int[Array, ' B'],
    cache: Cache,
    compute: Compute,
) -> tuple[Float[Array, 'B T V'], Cache]:
    """Float32 logits after each of T more tokens in each row, from place `at_B` on, and the cache
    with them; `params` turned."""
    visible = cache.visible(at_B, token_BT.shape[1], pattern=config.pattern)
    rope = rotation(
        at_B[:, None] + jnp.arange(token_BT.shape[1]),
        head_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
    )
    dtype = precision.dtype(compute.precision)
    x_BTD = rows(params['embed_VD'], token_BT, letters='BTD', dtype=dtype)
    x_DBT = jnp.einsum('BTD->DBT', x_BTD)
    written = []
    for block, layer in zip(params['blocks'], cache.layers, strict=True):
        h_DBT = _norm(x_DBT, block['attention_norm']['scale_D'], config.norm_eps)
        w = block['attention']
        q_BTNH = rotate(_heads(w['q_NHD'], h_DBT), rope)
        k_BTKH = rotate(_heads(w['k_KHD'], h_DBT), rope)
        layer = layer.write(k_BTKH, _heads(w['v_KHD'], h_DBT), at_B=at_B, pattern=config.pattern)
        attended_BTNH = kernels.attend_cached(
            q_BTNH, layer.k_BKHS, layer.v_BKSH, visible=visible, backend=compute.attention
        )
        attended_NHBT = jnp.einsum('BTNH->NHBT', attended_BTNH)
        x_DBT += product('DNH,NHBT->DBT', w['out_DNH'], attended_NHBT, dtype=dtype)
        h_DBT = _norm(x_DBT, block['mlp_norm']['scale_D'], config.norm_eps)
        w = block['mlp']
        gate_FBT = product('FD,DBT->FBT', w['gate_FD'], h_DBT, dtype=dtype)
        up_FBT = product('FD,DBT->FBT', w['up_FD'], h_DBT, dtype=dtype)
        hidden_FBT = jax.nn.silu(gate_FBT) * up_FBT
        x_DBT += product('DF,FBT->DBT', w['down_DF'], hidden_FBT, dtype=dtype)
        written.append(layer)
    x_DBT = _norm(x_DBT, params['norm']['scale_D'], config.norm_eps)
    head_VD = params['embed_VD'] if config.tied else params['head_VD']
    logits_VBT = product('VD,DBT->VBT', head_VD, x_DBT, dtype=jnp.float32)
    # Or XLA moves the transposition into the product, and computes that in the slow order.
    logits_VBT = jax.lax.optimization_barrier(logits_VBT)
    return jnp.einsum('VBT->BTV', logits_VBT), Cache(written)


def _heads(w_NHD: Weight, x_DBT: jax.Array) -> jax.Array:
    q_NHBT = product('NHD,DBT->NHBT', w_NHD, x_DBT, dtype=x_DBT.dtype)
    return jnp.einsum('NHBT->BTNH', q_NHBT)


def _norm(x_DBT: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    x_f32 = x_DBT.astype(jnp.float32)
    square_BT = jnp.mean(jnp.square(x_f32), axis=0)
    return (x_f32 * jax.lax.rsqrt(square_BT + eps)).astype(x_DBT.dtype) * scale_D[:, None, None]

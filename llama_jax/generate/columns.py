"""One step of decoding on a CPU: weights first, one column per row of the batch.

The same function as model/transformer.py for a model of the LLaMA family (`ModelConfig.llama`), in
the order of operands that a CPU is fast at: weights lie with their outputs first, and multiply
activations [D, B]. A product with few rows then reads its weight at the speed of memory. The order
of training, x [B, D] times w [D, F], reads it at 0.8 of that speed for one row, and at half of it
for 2 to 8 rows (XLA:CPU of jax 0.10.2, 2 cores).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.model import kernels
from llama_jax.model.cache import Cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
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
    token_B: Int[Array, ' B'],
    position_B: Int[Array, ' B'],
    cache: Cache,
    compute: Compute,
) -> tuple[Float[Array, 'B V'], Cache]:
    """Float32 logits after one more token in each row, and the cache with it; `params` turned."""
    visible = cache.visible(position_B, 1, pattern=config.pattern)
    rope = rotation(
        position_B[:, None],
        head_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
    )
    x_BD = params['embed_VD'].at[token_B].get(out_sharding=layout.act('BD'))
    x_DB = x_BD.T
    written = []
    for block, layer in zip(params['blocks'], cache.layers, strict=True):
        h_DB = _norm(x_DB, block['attention_norm']['scale_D'], config.norm_eps)
        w = block['attention']
        q_BTNH = rotate(_heads(w['q_NHD'], h_DB), rope)
        k_BTKH = rotate(_heads(w['k_KHD'], h_DB), rope)
        layer = layer.write(k_BTKH, _heads(w['v_KHD'], h_DB), at_B=position_B)
        attended_BTNH = kernels.attend_cached(
            q_BTNH, layer.k_BKHS, layer.v_BKSH, visible=visible, backend=compute.attention
        )
        attended_NHB = jnp.einsum('BTNH->NHB', attended_BTNH)
        x_DB += jax.lax.dot_general(  # contracts N before H, as they lie; an einsum would not
            w['out_DNH'], attended_NHB, (((1, 2), (0, 1)), ((), ())), out_sharding=layout.act('DB')
        )
        h_DB = _norm(x_DB, block['mlp_norm']['scale_D'], config.norm_eps)
        w = block['mlp']
        hidden_FB = jax.nn.silu(w['gate_FD'] @ h_DB) * (w['up_FD'] @ h_DB)
        x_DB += jnp.einsum('DF,FB->DB', w['down_DF'], hidden_FB, out_sharding=layout.act('DB'))
        written.append(layer)
    x_DB = _norm(x_DB, params['norm']['scale_D'], config.norm_eps)
    head_VD = params['embed_VD'] if config.tied else params['head_VD']
    logits_VB = jnp.einsum('VD,DB->VB', head_VD, x_DB, preferred_element_type=jnp.float32)
    # Or XLA moves the transposition into the product, and computes that in the slow order.
    logits_VB = jax.lax.optimization_barrier(logits_VB)
    return logits_VB.T, Cache(written)


def _heads(w_NHD: jax.Array, x_DB: jax.Array) -> jax.Array:
    q_NHB = jnp.einsum('NHD,DB->NHB', w_NHD, x_DB)
    return jnp.einsum('NHB->BNH', q_NHB)[:, None]


def _norm(x_DB: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    x_f32 = x_DB.astype(jnp.float32)
    square_B = jnp.mean(jnp.square(x_f32), axis=0)
    return (x_f32 * jax.lax.rsqrt(square_B + eps)).astype(x_DB.dtype) * scale_D[:, None]

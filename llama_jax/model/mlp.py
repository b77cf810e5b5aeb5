"""SwiGLU feed-forward layer (Shazeer 2020, eq. 6)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax import layout
from llama_jax.model.config import ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.linear import project


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        D, F = config.dim, config.ffn
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate_DF = nnx.Param(fan_in(gate_key, (D, F), D))
        self.up_DF = nnx.Param(fan_in(up_key, (D, F), D))
        self.down_FD = nnx.Param(fan_in(down_key, (F, D), F * 2 * config.layers))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        gate_DF = layout.gather(self.gate_DF[...].astype(dtype), 'DF')
        up_DF = layout.gather(self.up_DF[...].astype(dtype), 'DF')
        down_FD = layout.gather(self.down_FD[...].astype(dtype), 'FD')

        gate_BTF = checkpoint_name(project(x_BTD, gate_DF, 'DF'), 'gate')
        up_BTF = checkpoint_name(project(x_BTD, up_DF, 'DF'), 'up')
        return jnp.einsum(
            'BTF,FD->BTD', jax.nn.silu(gate_BTF) * up_BTF, down_FD, out_sharding=layout.act('BTD')
        )

"""Feed-forward layers: SwiGLU (Shazeer 2020, eq. 6), and the classic one of two matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model.config import ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.linear import bias, close, in_use, project, shifted

_ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
    'relu': jax.nn.relu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
}


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)). `sublayers` add to the residual stream in all."""

    def __init__(self, config: ModelConfig, *, sublayers: int, key: jax.Array):
        D, F = config.dim, config.ffn
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate_DF = nnx.Param(fan_in(gate_key, (D, F), D))
        self.up_DF = nnx.Param(fan_in(up_key, (D, F), D))
        self.down_FD = nnx.Param(fan_in(down_key, (F, D), F * sublayers))
        self.gate_bias_F = bias(config, F)
        self.up_bias_F = bias(config, F)
        self.down_bias_D = bias(config, D)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        gate_DF = in_use(self.gate_DF, 'DF', dtype)
        up_DF = in_use(self.up_DF, 'DF', dtype)
        down_FD = in_use(self.down_FD, 'FD', dtype)

        gate_BTF = shifted(project(x_BTD, gate_DF, 'DF'), self.gate_bias_F, 'F')
        up_BTF = shifted(project(x_BTD, up_DF, 'DF'), self.up_bias_F, 'F')
        gate_BTF = checkpoint_name(gate_BTF, 'gate')
        up_BTF = checkpoint_name(up_BTF, 'up')
        out_BTD = close(jax.nn.silu(gate_BTF) * up_BTF, down_FD, 'FD')
        return shifted(out_BTD, self.down_bias_D, 'D')


class Classic(nnx.Module):
    """down(activation(up(x))) (Vaswani et al. 2017, eq. 2), with ReLU or GELU (Hendrycks & Gimpel
    2016, in its exact form)."""

    def __init__(self, config: ModelConfig, *, sublayers: int, key: jax.Array):
        D, F = config.dim, config.ffn
        up_key, down_key = jax.random.split(key)
        self.activation = config.mlp
        self.up_DF = nnx.Param(fan_in(up_key, (D, F), D))
        self.down_FD = nnx.Param(fan_in(down_key, (F, D), F * sublayers))
        self.up_bias_F = bias(config, F)
        self.down_bias_D = bias(config, D)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        up_DF = in_use(self.up_DF, 'DF', dtype)
        down_FD = in_use(self.down_FD, 'FD', dtype)

        up_BTF = shifted(project(x_BTD, up_DF, 'DF'), self.up_bias_F, 'F')
        hidden_BTF = _ACTIVATION[self.activation](checkpoint_name(up_BTF, 'up'))
        out_BTD = close(hidden_BTF, down_FD, 'FD')
        return shifted(out_BTD, self.down_bias_D, 'D')


def feed_forward(config: ModelConfig, *, sublayers: int, key: jax.Array) -> SwiGLU | Classic:
    """The kind of feed-forward layer that `config` asks for."""
    if config.mlp == 'swiglu':
        return SwiGLU(config, sublayers=sublayers, key=key)
    return Classic(config, sublayers=sublayers, key=key)

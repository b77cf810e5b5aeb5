"""One pre-norm decoder layer, and what its backward pass keeps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.model.attention import Attention
from llama_jax.model.cache import LayerCache
from llama_jax.model.config import Compute, ModelConfig, Remat
from llama_jax.model.masks import Visibility
from llama_jax.model.mlp import SwiGLU
from llama_jax.model.norm import RMSNorm
from llama_jax.model.rope import Rotation

_PROJECTED = ('query', 'key', 'value')


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, key=attention_key)
        self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config, key=mlp_key)

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        rope: Rotation,
        visible: Visibility,
        compute: Compute,
        cache: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Apply the layer; with a `key`, dropout is on."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope('attention'):
            update_BTD, cache = self.attention(
                self.attention_norm(x_BTD), rope=rope, visible=visible, compute=compute, cache=cache
            )
            x_BTD = x_BTD + drop(update_BTD, self.dropout, attention_key)
        with jax.named_scope('mlp'):
            update_BTD = self.mlp(self.mlp_norm(x_BTD))
            x_BTD = x_BTD + drop(update_BTD, self.dropout, mlp_key)
        return x_BTD, cache


def drop(x_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout (Srivastava et al. 2014), scaled to keep the mean. The identity without a key."""
    if key is None or rate == 0:
        return x_BTD
    uniform = jax.random.uniform(key, x_BTD.shape, out_sharding=layout.act('BTD'))
    return jnp.where(uniform >= rate, x_BTD / (1 - rate), jnp.zeros_like(x_BTD))


def rematerialized(layer: Callable, remat: Remat) -> Callable:
    """`layer` with its backward pass keeping only what the policy `remat` names."""
    policies = jax.checkpoint_policies
    if remat == 'none':
        return layer
    if remat == 'dots':
        # linear.project is no dot to a policy: what comes of it is kept by name.
        products = policies.save_only_these_names(*_PROJECTED, 'gate', 'up')
        return jax.checkpoint(
            layer,
            policy=policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, products
            ),
        )
    if remat == 'named':
        kept = policies.save_only_these_names(*_PROJECTED, 'attended')
        return jax.checkpoint(layer, policy=kept)
    if remat == 'full':
        return jax.checkpoint(layer, policy=policies.nothing_saveable)
    raise UserError(f'compute.remat {remat!r} is not one of none, dots, named, full')

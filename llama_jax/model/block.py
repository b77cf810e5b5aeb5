"""One layer of a decoder or an encoder, and what its backward pass keeps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.keys import named_key
from llama_jax.model.attention import Attention
from llama_jax.model.cache import LayerCache
from llama_jax.model.config import Compute, ModelConfig, Remat
from llama_jax.model.masks import Visibility
from llama_jax.model.mlp import feed_forward
from llama_jax.model.norm import Norm, norm
from llama_jax.model.rope import Rotation

_PROJECTED = ('query', 'key', 'value')


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); in a decoder with an encoder,
    x + cross(norm(x), memory) between them. Post-norm: norm(x + attention(x)), and so on.

    `depth` layers of this kind follow each other.
    """

    def __init__(self, config: ModelConfig, *, depth: int, cross: bool, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        sublayers = depth * (3 if cross else 2)
        self.dropout = config.dropout
        self.post = config.norm_place == 'post'
        self.attention_norm = norm(config)
        self.attention = Attention(config, sublayers=sublayers, key=attention_key)
        self.cross_norm = norm(config) if cross else None
        self.cross = (
            Attention(config, sublayers=sublayers, key=named_key(key, 'cross')) if cross else None
        )
        self.mlp_norm = norm(config)
        self.mlp = feed_forward(config, sublayers=sublayers, key=mlp_key)

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        rope: Rotation | None,
        visible: Visibility,
        compute: Compute,
        memory: tuple[jax.Array | LayerCache, Visibility] | None = None,
        cache: LayerCache | None = None,
        at_B: jax.Array | None = None,
        key: jax.Array | None = None,
        source: tuple[jax.Array, Rotation | None] | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Apply the layer; with a `key`, dropout is on. `memory` is what an encoder made [B, S, D],
        or its keys and values, and what of it is seen. `source`: the whole rows [B, S, D] and their
        rotation, where `x_BTD` has some places of them alone; they attend to all."""
        n_sublayers = 2 if self.cross is None else 3
        keys = [None] * n_sublayers if key is None else list(jax.random.split(key, n_sublayers))
        with jax.named_scope('attention'):
            update_BTD, cache = self.attention(
                self._before(self.attention_norm, x_BTD),
                rope=rope,
                visible=visible,
                compute=compute,
                memory=None if source is None else self._before(self.attention_norm, source[0]),
                memory_rope=None if source is None else source[1],
                cache=cache,
                at_B=at_B,
            )
            x_BTD = self._after(self.attention_norm, x_BTD, update_BTD, keys[0])
        if self.cross is not None and self.cross_norm is not None and memory is not None:
            with jax.named_scope('cross'):
                update_BTD, _ = self.cross(
                    self._before(self.cross_norm, x_BTD),
                    rope=None,
                    memory=memory[0],
                    visible=memory[1],
                    compute=compute,
                )
                x_BTD = self._after(self.cross_norm, x_BTD, update_BTD, keys[1])
        with jax.named_scope('mlp'):
            update_BTD = self.mlp(self._before(self.mlp_norm, x_BTD))
            x_BTD = self._after(self.mlp_norm, x_BTD, update_BTD, keys[-1])
        return x_BTD, cache

    def _before(self, norm: Norm, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.post else norm(x_BTD)

    def _after(
        self, norm: Norm, x_BTD: jax.Array, update_BTD: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        x_BTD = x_BTD + drop(update_BTD, self.dropout, key)
        return norm(x_BTD) if self.post else x_BTD


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

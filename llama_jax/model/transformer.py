"""The LLaMA decoder (Touvron et al. 2023)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax import layout, precision
from llama_jax.errors import UserError
from llama_jax.mesh import platform_in_use
from llama_jax.model.block import Block, drop, rematerialized
from llama_jax.model.cache import Cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.masks import Visibility
from llama_jax.model.norm import RMSNorm
from llama_jax.model.rope import rotation


class Transformer(nnx.Module):
    """Embedding, blocks, final norm and head.

    `blocks` is one Block whose arrays are stacked over layers (a scan: short programs, training),
    or a list of Blocks (unrolled: each layer's cache is updated in place, decoding).
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        embed_key, head_key, blocks_key = jax.random.split(key, 3)
        shape = (config.vocab, config.dim)
        self.config = config
        self.embed_VD = nnx.Param(fan_in(embed_key, shape, config.dim))
        self.blocks: Block | nnx.List = jax.vmap(lambda key: Block(config, key=key))(
            jax.random.split(blocks_key, config.layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head_VD = None if config.tied else nnx.Param(fan_in(head_key, shape, config.dim))

    def __call__(
        self,
        token_BT: Int[Array, 'B T'],
        *,
        position_BT: Int[Array, 'B T'] | None = None,
        segment_BT: Int[Array, 'B T'] | None = None,
        compute: Compute,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, 'B T V'], Cache | None]:
        """Float32 logits of the next token at every position, and the cache with these tokens."""
        x_BTD, cache = self.features(
            token_BT,
            position_BT=position_BT,
            segment_BT=segment_BT,
            compute=compute,
            cache=cache,
            key=key,
        )
        return self.logits(x_BTD), cache

    def features(
        self,
        token_BT: Int[Array, 'B T'],
        *,
        position_BT: Int[Array, 'B T'] | None = None,
        segment_BT: Int[Array, 'B T'] | None = None,
        compute: Compute,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, 'B T D'], Cache | None]:
        """Normalised output of the last layer, before the head.

        Args:
          token_BT: token ids.
          position_BT: rotary position of each token; default: its place in the row.
          segment_BT: document of each token, 0 for padding; tokens see only their own document.
            Default: one document, no padding.
          compute: precision, kernels and rematerialisation.
          cache: keys and values of earlier tokens; needs unrolled blocks (see layers.unstack).
          key: turns dropout on.
        """
        config = self.config
        start = 0 if cache is None else cache.cursor
        if position_BT is None:
            position_BT = jnp.broadcast_to(start + jnp.arange(token_BT.shape[1]), token_BT.shape)
        if segment_BT is None:
            segment_BT = jnp.ones_like(token_BT)
        # Costs nothing where they lie so already; plain arrays are welcome too.
        token_BT, position_BT, segment_BT = (
            jax.reshard(x_BT, layout.act('BT')) for x_BT in (token_BT, position_BT, segment_BT)
        )
        if cache is None:
            visible = Visibility(segment_BT, segment_BT)
        else:
            segment_BS = jax.lax.dynamic_update_slice_in_dim(
                cache.segment_BS, segment_BT, start, axis=1
            )
            visible = Visibility(segment_BT, segment_BS, query_start=start)
        rope = rotation(
            position_BT,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
        )
        keys = None if key is None else jax.random.split(key, 1 + config.layers)
        embed_VD = layout.gather(
            self.embed_VD[...].astype(precision.dtype(compute.precision)), 'VD'
        )
        x_BTD = embed_VD.at[token_BT].get(out_sharding=layout.act('BTD'))
        x_BTD = drop(x_BTD, config.dropout, None if keys is None else keys[0])
        context: dict[str, Any] = {'rope': rope, 'visible': visible, 'compute': compute}

        if not isinstance(self.blocks, nnx.List):
            if cache is not None:
                raise UserError('decoding with a cache needs unrolled layers: see layers.unstack')
            layer_keys = None if keys is None else keys[1:]
            return self.norm(self._scanned(x_BTD, layer_keys, **context)), None

        written = []
        for i, block in enumerate(self.blocks):
            x_BTD, layer_cache = block(
                x_BTD,
                cache=None if cache is None else cache.layers[i],
                key=None if keys is None else keys[1 + i],
                **context,
            )
            written.append(layer_cache)
        if cache is not None:
            cache = Cache(written, visible.key_segment_BS, cache.cursor + token_BT.shape[1])
        return self.norm(x_BTD), cache

    def _scanned(
        self, x_BTD: jax.Array, layer_keys: jax.Array | None, *, compute: Compute, **context: Any
    ) -> jax.Array:
        def layer(x_BTD: jax.Array, block_and_key: Any) -> tuple[jax.Array, None]:
            # Cut the layer out of the stack first: else the TPU compiler gathers it with the
            # stack's dimension of one still on, in padded tiles, and transposes the result.
            block, key = jax.lax.optimization_barrier(block_and_key)
            return block(x_BTD, key=key, compute=compute, **context)[0], None

        layers = (self.blocks, layer_keys)
        remat = rematerialized(layer, compute.remat)
        # XLA for CPUs merges recomputed work of an unrolled scan back into the kept one.
        unrolled = platform_in_use() == 'cpu' and compute.remat == 'none'
        unroll = compute.unroll or (self.config.layers if unrolled else 1)
        return jax.lax.scan(remat, x_BTD, layers, unroll=unroll)[0]

    def logits(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """Float32 logits of `features`. Training never forms them whole: objectives/softmax.py."""
        head_VD = layout.gather(self.head()[...].astype(x_BTD.dtype), 'VD')
        return jnp.einsum('BTD,VD->BTV', x_BTD, head_VD, preferred_element_type=jnp.float32)

    def head(self) -> nnx.Param:
        """Output head [V, D], at rest: the embedding itself when tied."""
        return self.embed_VD if self.head_VD is None else self.head_VD

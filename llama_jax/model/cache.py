"""Keys and values of the tokens already read."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer."""

    k_BSKH: Float[Array, 'B S K H']
    v_BSKH: Float[Array, 'B S K H']

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, *, at: jax.Array | int) -> LayerCache:
        """The same cache with T more tokens from slot `at` on."""
        return LayerCache(
            jax.lax.dynamic_update_slice_in_dim(self.k_BSKH, k_BTKH, at, axis=1),
            jax.lax.dynamic_update_slice_in_dim(self.v_BSKH, v_BTKH, at, axis=1),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """A list of per-layer arrays, each updated in place when the whole is donated.

    All rows share one cursor: a shorter prompt stands to the right of padding (segment 0), so that
    a step writes every row at the same slot.
    """

    layers: list[LayerCache]
    segment_BS: Int[Array, 'B S']
    """1 where the slot holds a token that may be seen, 0 where it holds padding or nothing yet."""
    cursor: Int[Array, '']
    """Slots written so far."""

    @staticmethod
    def empty(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
        """A cache for `batch` rows of up to `slots` tokens, zeroed, on the mesh in use."""
        shape = (batch, slots, config.kv_heads, config.head_dim)

        def zeros() -> jax.Array:
            return jnp.zeros(shape, dtype, out_sharding=layout.act('BSKH'))

        return Cache(
            layers=[LayerCache(zeros(), zeros()) for _ in range(config.layers)],
            segment_BS=jnp.zeros((batch, slots), jnp.int32, out_sharding=layout.act('BS')),
            cursor=jnp.zeros((), jnp.int32),
        )

"""Keys and values of the tokens already read."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.model.config import ModelConfig
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import Dense, Pattern


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer.

    They lie as the two matrix products of a decoding step read them: any other order is
    transposed, whole, at every step (on a CPU that takes five times as long at 8 rows).
    """

    k_BKHS: Float[Array, 'B K H S']
    v_BKSH: Float[Array, 'B K S H']

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, *, at: jax.Array | int) -> LayerCache:
        """The same cache with T more tokens from slot `at` on."""
        k_BKHT = jnp.einsum('BTKH->BKHT', k_BTKH)
        v_BKTH = jnp.einsum('BTKH->BKTH', v_BTKH)
        return LayerCache(
            jax.lax.dynamic_update_slice_in_dim(self.k_BKHS, k_BKHT, at, axis=3),
            jax.lax.dynamic_update_slice_in_dim(self.v_BKSH, v_BKTH, at, axis=2),
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

    def visible(
        self,
        segment_BT: Int[Array, 'B T'],
        *,
        pattern: Pattern,
        prefix_BT: Int[Array, 'B T'] | None = None,
    ) -> Visibility:
        """What T more tokens see, of those in the cache and of themselves."""

        def placed(old_BS: jax.Array, new_BT: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old_BS, new_BT, self.cursor, axis=1)

        segment_BS = placed(self.segment_BS, segment_BT)
        prefix_BS = first_B = None
        if prefix_BT is not None:
            prefix_BS = placed(jnp.zeros_like(segment_BS), prefix_BT.astype(segment_BS.dtype))
        if pattern != Dense():
            first_B = jnp.argmax(segment_BS > 0, axis=1)
        return Visibility(
            *(segment_BT, segment_BS),
            query_start=self.cursor,
            prefix_BS=prefix_BS,
            first_B=first_B,
            pattern=pattern,
        )

    @staticmethod
    def empty(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
        """A cache for `batch` rows of up to `slots` tokens, zeroed, on the mesh in use."""
        size = {'B': batch, 'K': config.kv_heads, 'H': config.head_dim, 'S': slots}

        def zeros(letters: str) -> jax.Array:
            shape = [size[letter] for letter in letters]
            return jnp.zeros(shape, dtype, out_sharding=layout.act(letters))

        return Cache(
            layers=[LayerCache(zeros('BKHS'), zeros('BKSH')) for _ in range(config.layers)],
            segment_BS=jnp.zeros((batch, slots), jnp.int32, out_sharding=layout.act('BS')),
            cursor=jnp.zeros((), jnp.int32),
        )

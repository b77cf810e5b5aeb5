"""Keys and values of the tokens already read."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.model.config import ModelConfig
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import Pattern, Window


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer; a row's token at place p is in slot p mod S.

    They lie as the two matrix products of a decoding step read them: any other order is
    transposed, whole, at every step (on a CPU that takes five times as long at 8 rows).
    """

    k_BKHS: Float[Array, 'B K H S']
    v_BKSH: Float[Array, 'B K S H']

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, *, at_B: jax.Array | None) -> LayerCache:
        """The same cache with T more tokens in each row, from place `at_B` on; None: the first."""
        k_BKHT = jnp.einsum('BTKH->BKHT', k_BTKH)
        v_BKTH = jnp.einsum('BTKH->BKTH', v_BTKH)
        if at_B is None:
            return LayerCache(
                jax.lax.dynamic_update_slice_in_dim(self.k_BKHS, k_BKHT, 0, axis=3),
                jax.lax.dynamic_update_slice_in_dim(self.v_BKSH, v_BKTH, 0, axis=2),
            )
        letters = ('BKHS', 'BKSH', 'BKHS', 'BKSH', 'B')
        write = jax.shard_map(
            _write_rows,
            in_specs=tuple(map(layout.act, letters)),
            out_specs=(layout.act('BKHS'), layout.act('BKSH')),
        )
        return LayerCache(*write(self.k_BKHS, self.v_BKSH, k_BKHT, v_BKTH, at_B))


def _write_rows(
    k_BKHS: jax.Array, v_BKSH: jax.Array, k_BKHT: jax.Array, v_BKTH: jax.Array, at_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """T tokens of each row from its own slot on; past the last slot they go on at the first."""
    S, T = v_BKSH.shape[2], v_BKTH.shape[2]
    if T == 1:
        # One small update after the other, each in place. As a scatter XLA:CPU loops over them.
        for b in range(len(at_B)):
            slot = at_B[b] % S
            k_BKHS = jax.lax.dynamic_update_slice(k_BKHS, k_BKHT[b : b + 1], (b, 0, 0, slot))
            v_BKSH = jax.lax.dynamic_update_slice(v_BKSH, v_BKTH[b : b + 1], (b, 0, slot, 0))
        return k_BKHS, v_BKSH
    row_B1 = jnp.arange(len(at_B))[:, None]
    slot_BT = (at_B[:, None] + jnp.arange(T)) % S
    k_BTKH, v_BTKH = jnp.einsum('BKHT->BTKH', k_BKHT), jnp.einsum('BKTH->BTKH', v_BKTH)
    return k_BKHS.at[row_B1, :, :, slot_BT].set(k_BTKH), v_BKSH.at[row_B1, :, slot_BT].set(v_BTKH)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cross:
    """Keys and values of what an encoder read, by layer of the decoder: computed once."""

    layers: list[LayerCache]
    segment_BS: Int[Array, 'B S']
    """1 for tokens, 0 for padding; no row is without a token."""

    @staticmethod
    def empty(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> Cross:
        """Zeros, all to be seen, on the mesh in use."""
        layers = Cache.empty(config, batch=batch, slots=slots, dtype=dtype).layers
        return Cross(layers, jnp.ones((batch, slots), jnp.int32, out_sharding=layout.act('BS')))

    def padded(self, slots: int) -> Cross:
        """The same with room for `slots` tokens."""

        def widen(x: jax.Array, axis: int) -> jax.Array:
            widths = [(0, slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
            return jnp.pad(x, widths)

        layers = [LayerCache(widen(x.k_BKHS, 3), widen(x.v_BKSH, 2)) for x in self.layers]
        return Cross(layers, widen(self.segment_BS, 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """A list of per-layer arrays, each updated in place when the whole is donated.

    Rows are independent of each other: each has read its own number of tokens, which the caller
    knows. What a row has not read is not seen, so rows need not be emptied. Under a window the
    slots are a ring: a new token takes the place of one that is out of sight.
    """

    layers: list[LayerCache]
    cross: Cross | None = None
    """Of the decoder of an encoder-decoder."""

    @property
    def slots(self) -> int:
        """Tokens that a row has room for."""
        return self.layers[0].v_BKSH.shape[2]

    def visible(self, at_B: Int[Array, ' B'], length: int, *, pattern: Pattern) -> Visibility:
        """What `length` more tokens of each row see from place `at_B` on: those in the cache, and
        of themselves those that are not later."""
        place_BT = at_B[:, None] + jnp.arange(length)
        last_B1, slot_S = place_BT[:, -1:], jnp.arange(self.slots)
        place_BS = last_B1 - (last_B1 - slot_S) % self.slots  # of a slot not used yet: negative
        return Visibility(
            jnp.ones_like(place_BT),
            (place_BS >= 0).astype(place_BT.dtype),
            query_place_BT=place_BT,
            key_place_BS=place_BS,
            pattern=pattern,
        )

    @staticmethod
    def empty(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
        """A cache for `batch` rows of `slots` tokens, zeroed, on the mesh in use."""
        size = {'B': batch, 'K': config.kv_heads, 'H': config.head_dim, 'S': slots}

        def zeros(letters: str) -> jax.Array:
            shape = [size[letter] for letter in letters]
            return jnp.zeros(shape, dtype, out_sharding=layout.act(letters))

        return Cache([LayerCache(zeros('BKHS'), zeros('BKSH')) for _ in range(config.layers)])


def slots_needed(config: ModelConfig, *, length: int, piece: int) -> int:
    """Slots for rows of `length` tokens that are read in pieces of at most `piece`: under a window,
    those that are in sight of a piece."""
    if isinstance(config.pattern, Window):
        return min(length, config.pattern.size + piece - 1)
    return length

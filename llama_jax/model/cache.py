"""Keys and values of the tokens already read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from llama_jax import layout
from llama_jax.mesh import platform_in_use
from llama_jax.model import kernels
from llama_jax.model.config import AttentionBackend, ModelConfig, by_length
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import Pattern, Window
from llama_jax.model.quantized import Quantized, Weight, quantize


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer; a row's token at place p is in slot p mod S.

    They lie as the two matrix products of a decoding step read them: any other order is
    transposed, whole, at every step (on a CPU that takes five times as long at 8 rows).
    """

    k_BKHS: Weight
    v_BKSH: Weight
    """Quantised: one scale for each token and head."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.v_BKSH.shape[0]

    @property
    def slots(self) -> int:
        """Tokens that a row has room for."""
        return self.v_BKSH.shape[2]

    def write(
        self,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        *,
        at_B: jax.Array | None,
        pattern: Pattern,
    ) -> LayerCache:
        """The same cache with T more tokens in each row, from place `at_B` on; None: the first.
        Under a window what does not fit behind the last slot goes on at the first."""
        k_BKHT = _like(self.k_BKHS, jnp.einsum('BTKH->BKHT', k_BTKH), head_axis=2)
        v_BKTH = _like(self.v_BKSH, jnp.einsum('BTKH->BKTH', v_BTKH), head_axis=3)
        if at_B is None:
            begin = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=0)
            return LayerCache(
                jax.tree.map(functools.partial(begin, axis=3), self.k_BKHS, k_BKHT),
                jax.tree.map(functools.partial(begin, axis=2), self.v_BKSH, v_BKTH),
            )
        letters = ('BKHS', 'BKSH', 'BKHS', 'BKSH', 'B')
        write = jax.shard_map(
            functools.partial(_write_rows, ring=isinstance(pattern, Window)),
            in_specs=tuple(map(layout.act, letters)),
            out_specs=(layout.act('BKHS'), layout.act('BKSH')),
        )
        # Places that were picked by slot lie whole on every device (jax 0.12).
        at_B = jax.reshard(at_B, layout.act('B'))
        return LayerCache(*write(self.k_BKHS, self.v_BKSH, k_BKHT, v_BKTH, at_B))

    def attend(
        self, q_BTNH: jax.Array, *, visible: Visibility, backend: AttentionBackend
    ) -> jax.Array:
        """What queries [B, T, N, H] take from it."""
        return kernels.attend_cached(
            q_BTNH, self.k_BKHS, self.v_BKSH, visible=visible, backend=backend
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerParts:
    """One layer of a batch whose rows lie in several arrays, one after the other: parts of a larger
    batch, of which the rest is neither read nor moved."""

    parts: tuple[LayerCache, ...]

    @property
    def slots(self) -> int:
        """See LayerCache."""
        return self.parts[0].slots

    def write(
        self,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        *,
        at_B: jax.Array | None,
        pattern: Pattern,
    ) -> LayerParts:
        """See LayerCache."""
        new = self._by_part((k_BTKH, v_BTKH, at_B))
        return LayerParts(
            tuple(
                part.write(k, v, at_B=at, pattern=pattern)
                for part, (k, v, at) in zip(self.parts, new, strict=True)
            )
        )

    def attend(
        self, q_BTNH: jax.Array, *, visible: Visibility, backend: AttentionBackend
    ) -> jax.Array:
        """See LayerCache."""
        attended = [
            part.attend(q, visible=seen, backend=backend)
            for part, (q, seen) in zip(self.parts, self._by_part((q_BTNH, visible)), strict=True)
        ]
        return jnp.concatenate(attended)

    def _by_part(self, rows: Any) -> list[Any]:
        """Arrays by row, cut as the parts are."""
        cut, start = [], 0
        for part in self.parts:
            of = functools.partial(
                jax.lax.slice_in_dim, start_index=start, limit_index=start + part.rows
            )
            cut.append(jax.tree.map(of, rows))
            start += part.rows
        return cut


def _like(cache: Weight, x: jax.Array, *, head_axis: int) -> Weight:
    """What is written, as the cache keeps it."""
    return quantize(x, (head_axis,)) if isinstance(cache, Quantized) else x


def _write_rows(
    k_BKHS: Weight,
    v_BKSH: Weight,
    k_BKHT: Weight,
    v_BKTH: Weight,
    at_B: jax.Array,
    *,
    ring: bool,
) -> tuple[Weight, Weight]:
    """T tokens of each row from its own slot on."""
    cpu, one_row = platform_in_use() == 'cpu', len(at_B) == 1

    def written(cache: jax.Array, new: jax.Array, *, axis: int) -> jax.Array:
        S, T = cache.shape[axis], new.shape[axis]

        def slices(cache: jax.Array) -> jax.Array:
            """One small update after the other, each in place."""
            for b in range(len(at_B)):
                at: list[Any] = [0] * cache.ndim
                at[0], at[axis] = b, at_B[b] % S
                cache = jax.lax.dynamic_update_slice(cache, new[b : b + 1], at)
            return cache

        if T > 1 and (ring or not cpu):
            row_B1 = jnp.arange(len(at_B))[:, None]
            slot_BT = (at_B[:, None] + jnp.arange(T)) % S
            where = (row_B1, *[slice(None)] * (axis - 1), slot_BT)
            return cache.at[where].set(jnp.moveaxis(new, axis, 1))
        if not (cpu and one_row):
            return slices(cache)
        # A loop of one turn. Without it XLA:CPU writes twice: into the cache, and into a copy of
        # it for attention, which has no dimension of one row and is made anew at every step.
        return jax.lax.fori_loop(0, jnp.minimum(at_B[0] + 1, 1), lambda _, x: slices(x), cache)

    return (
        jax.tree.map(functools.partial(written, axis=3), k_BKHS, k_BKHT),
        jax.tree.map(functools.partial(written, axis=2), v_BKSH, v_BKTH),
    )


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

        def widen(x: Weight, axis: int) -> jax.Array:
            assert not isinstance(x, Quantized)
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
    length_B: Int[Array, ' B'] | None = None
    """The longest that each row will be, where the rotation goes by length (config.by_length), else
    None. Keys were rotated for it, so that it cannot change later."""

    @property
    def slots(self) -> int:
        """Tokens that a row has room for."""
        return self.layers[0].slots

    def visible(
        self,
        at_B: Int[Array, ' B'],
        length: int,
        *,
        pattern: Pattern,
        until_BS: Int[Array, 'B S'] | None = None,
        sees_BT: Int[Array, 'B T'] | None = None,
    ) -> Visibility:
        """What `length` more tokens of each row see from place `at_B` on: those in the cache, and
        of themselves those that are not later. `until_BS`: see Visibility; by place, and no window
        may have moved places to other slots. `sees_BT`: up to which place each of them sees, in
        place of its own."""
        place_BT = at_B[:, None] + jnp.arange(length)
        last_B1, slot_S = place_BT[:, -1:], jnp.arange(self.slots)
        place_BS = last_B1 - (last_B1 - slot_S) % self.slots  # of a slot not used yet: negative
        return Visibility(
            jnp.ones_like(place_BT),
            (place_BS >= 0).astype(place_BT.dtype),
            query_place_BT=place_BT if sees_BT is None else sees_BT,
            key_place_BS=place_BS,
            until_BS=until_BS,
            pattern=pattern,
        )

    @staticmethod
    def empty(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
        """A cache for `batch` rows of `slots` tokens, zeroed, on the mesh in use; of int8, with
        scales, if that is its `dtype`."""
        size = {'B': batch, 'K': config.kv_heads, 'H': config.head_dim, 'S': slots}

        def zeros(letters: str, dtype: jnp.dtype, **sizes: int) -> jax.Array:
            shape = [{**size, **sizes}[letter] for letter in letters]
            return jnp.zeros(shape, dtype, out_sharding=layout.act(letters))

        def one(letters: str) -> Weight:
            x = zeros(letters, dtype)
            if dtype != jnp.int8:
                return x
            return Quantized(x, zeros(letters, jnp.dtype(jnp.float32), H=1))

        layers = [LayerCache(one('BKHS'), one('BKSH')) for _ in range(config.layers)]
        goes_by_length = config.positions == 'rope' and by_length(config.rope_scaling)
        return Cache(layers, length_B=zeros('B', jnp.dtype(jnp.int32)) if goes_by_length else None)


def joined(caches: Sequence[Cache]) -> Cache:
    """Caches of one model as one of all their rows, without a copy of keys or values."""
    if len(caches) == 1:
        return caches[0]
    crosses = [cache.cross for cache in caches if cache.cross is not None]
    lengths = [cache.length_B for cache in caches if cache.length_B is not None]
    cross = None
    if crosses:
        segment_BS = jnp.concatenate([cross.segment_BS for cross in crosses])
        cross = Cross(_side_by_side([cross.layers for cross in crosses]), segment_BS)
    return Cache(
        _side_by_side([cache.layers for cache in caches]),
        cross,
        jnp.concatenate(lengths) if lengths else None,
    )


def apart(cache: Cache, caches: Sequence[Cache]) -> list[Cache]:
    """The keys and values of `joined` caches, one by one again; all else is as in `caches`."""
    if len(caches) == 1:
        return [cache]
    return [
        replace(one, layers=[layer.parts[i] for layer in cache.layers])  # type: ignore[attr-defined]
        for i, one in enumerate(caches)
    ]


def _side_by_side(layers: Sequence[Any]) -> Any:
    """What models use like a list of LayerCache, by `write`, `attend` and `slots`."""
    return [LayerParts(parts) for parts in zip(*layers, strict=True)]


def slots_needed(config: ModelConfig, *, length: int, piece: int) -> int:
    """Slots for rows of `length` tokens that are read in pieces of at most `piece`: under a window,
    those that are in sight of a piece."""
    if isinstance(config.pattern, Window):
        return min(length, config.pattern.size + piece - 1)
    return length


def placed(cache: Cache | Cross) -> Any:
    """How the arrays of a cache lie: keys and values, and what is by row."""
    rows = layout.rows()
    return jax.tree.map(
        lambda x: layout.act('BK') if x.ndim == 4 else P(*rows, *[None] * (x.ndim - 1)), cache
    )

"""Places of a row whose output is read, such as those that bear loss: work that needs no other
place is done there alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import Dense
from llama_jax.model.rope import Rotation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Wanted:
    """Where the output of a model is read. N of a shape are the `most` places of a row."""

    at_BT: Bool[Array, 'B T']
    most: int = field(metadata={'static': True})
    """Places of a row that there is room for. A batch with more in one of its rows is computed at
    all places: the output is the same, and takes longer."""

    def of(
        self,
        x_BTD: Float[Array, 'B T D'],
        at_wanted: Callable[[jax.Array], jax.Array],
        at_all: Callable[[jax.Array], jax.Array],
    ) -> Float[Array, 'B T D']:
        """What one of the two makes of `x_BTD`, with zeros where it is not wanted. `at_wanted`
        gives it at `places` [B, N, D], `at_all` everywhere."""

        def put(x_BTD: jax.Array) -> jax.Array:
            rank_BT = jnp.cumsum(self.at_BT, axis=1, dtype=jnp.int32) - 1
            return _taken(at_wanted(x_BTD), jnp.where(self.at_BT, rank_BT, self.most))

        def cleared(x_BTD: jax.Array) -> jax.Array:
            return jnp.where(self.at_BT[:, :, None], at_all(x_BTD), 0)

        fits = jnp.all(jnp.sum(self.at_BT, axis=1) <= self.most)
        # What is hardly ever taken keeps nothing for its backward pass: room is made all the same.
        return jax.lax.cond(fits, put, jax.checkpoint(cleared), x_BTD)

    def places(self) -> Int[Array, 'B N']:
        """Of the wanted ones, in their order; T behind the last."""
        T = self.at_BT.shape[1]
        place_BT = jnp.where(self.at_BT, jnp.arange(T), T)
        return jnp.sort(place_BT, axis=1)[:, : self.most]

    def taken(self, x_BTD: Float[Array, 'B T *D']) -> Float[Array, 'B N *D']:
        """What stands at `places`; zeros behind the last."""
        return _taken(x_BTD, self.places())

    def rotation(self, by: Rotation | None) -> Rotation | None:
        """Of the tokens at `places`."""
        return None if by is None else Rotation(*map(self.taken, by))

    def visible(self, visible: Visibility) -> Visibility:
        """What the tokens at `places` see of whole rows. What stands behind the last sees what the
        first token does, so that it is not without a key."""
        place_BN, segment_BS = self.places(), visible.key_segment_BS
        is_none_BN = place_BN == self.at_BT.shape[1]
        segment_BN = jnp.where(is_none_BN, segment_BS[:, :1], self.taken(visible.query_segment_BT))
        query_BN, key_BS = visible.query_place_BT, visible.key_place_BS
        if visible.causal or visible.pattern != Dense() or query_BN is not None:
            if query_BN is None or key_BS is None:
                query_BN = key_BS = jnp.cumsum(jnp.ones_like(segment_BS), axis=1) - 1
            query_BN = jnp.where(is_none_BN, key_BS[:, :1], self.taken(query_BN))
        return Visibility(
            *(segment_BN, segment_BS, query_BN, key_BS, visible.prefix_BS, visible.until_BS),
            causal=visible.causal,
            pattern=visible.pattern,
        )


def _taken(x_BTD: jax.Array, at_BN: jax.Array) -> jax.Array:
    """`x_BTD[b, at_BN[b]]` for each row b, zeros where that is beyond the row."""

    def local(x_BTD: jax.Array, at_BN: jax.Array) -> jax.Array:
        return jax.vmap(lambda x_TD, at_N: x_TD.at[at_N].get(mode='fill', fill_value=0))(
            x_BTD, at_BN
        )

    # Each device has whole rows: said so, for a gather of unknown places would be one of all rows.
    placed = layout.act('BTD'[: min(x_BTD.ndim, 3)] + 'H' * (x_BTD.ndim - 3))
    gather = jax.shard_map(local, in_specs=(placed, layout.act('BT')), out_specs=placed)
    return gather(jax.reshard(x_BTD, placed), jax.reshard(at_BN, layout.act('BT')))

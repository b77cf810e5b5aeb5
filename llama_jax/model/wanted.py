"""Places of a row whose output is read: work that needs no other place is done there alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Wanted:
    """Where the output of a model is read."""

    at_BT: Bool[Array, 'B T']
    most: int = field(metadata={'static': True})
    """Places of a row that there is room for. A batch with more in one of its rows is computed at
    all places: the output is the same, and takes longer."""

    def apply(
        self, f: Callable[[jax.Array], jax.Array], x_BTD: Float[Array, 'B T D']
    ) -> Float[Array, 'B T D']:
        """`f(x_BTD)` where it is wanted, and zeros elsewhere; `f` maps each place by itself."""

        def at_all(x_BTD: jax.Array) -> jax.Array:
            return jnp.where(self.at_BT[:, :, None], f(x_BTD), 0)

        def at_wanted(x_BTD: jax.Array) -> jax.Array:
            return _taken(f(_taken(x_BTD, self._places())), self._ranks())

        fits = jnp.all(jnp.sum(self.at_BT, axis=1) <= self.most)
        # What is hardly ever taken keeps nothing for its backward pass: room is made all the same.
        return jax.lax.cond(fits, at_wanted, jax.checkpoint(at_all), x_BTD)

    def _places(self) -> Int[Array, 'B T']:
        """Of the wanted ones in their order, [B, most]; T behind the last."""
        T = self.at_BT.shape[1]
        place_BT = jnp.where(self.at_BT, jnp.arange(T), T)
        return jnp.sort(place_BT, axis=1)[:, : self.most]

    def _ranks(self) -> Int[Array, 'B T']:
        """Of each place among the wanted ones; beyond them all for one that is not wanted."""
        rank_BT = jnp.cumsum(self.at_BT, axis=1, dtype=jnp.int32) - 1
        return jnp.where(self.at_BT, rank_BT, self.most)


def _taken(x_BTD: jax.Array, at_BN: jax.Array) -> jax.Array:
    """`x_BTD[b, at_BN[b]]` for each row b, zeros where that is beyond the row."""

    def local(x_BTD: jax.Array, at_BN: jax.Array) -> jax.Array:
        return jax.vmap(lambda x_TD, at_N: x_TD.at[at_N].get(mode='fill', fill_value=0))(
            x_BTD, at_BN
        )

    # Each device has whole rows: said so, for a gather of unknown places would be one of all rows.
    specs = layout.act('BTD'), layout.act('BT')
    gather = jax.shard_map(local, in_specs=specs, out_specs=layout.act('BTD'))
    return gather(x_BTD, jax.reshard(at_BN, layout.act('BT')))

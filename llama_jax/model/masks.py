"""Which keys a query may see."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llama_jax.model.patterns import Dense, Pattern


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visibility:
    """A query sees keys of its own segment: those that do not come after it, and those of a prefix;
    or, not causal, all of them. A sparse pattern takes some away.

    Segments number the documents packed into a row, from 1; padding is segment 0, which sees only
    itself, so that no query is without a key. Queries and keys stand at places 0, 1, ... of their
    rows, unless told otherwise, as a cache does; those of one place see each other.
    """

    query_segment_BT: Int[Array, 'B T']
    key_segment_BS: Int[Array, 'B S']
    query_place_BT: Int[Array, 'B T'] | None = None
    key_place_BS: Int[Array, 'B S'] | None = None
    prefix_BS: Int[Array, 'B S'] | None = None
    """Not 0: a key that every query of its segment sees."""
    until_BS: Int[Array, 'B S'] | None = None
    """The first place whose query does not see the key any more: of a tree of texts, written one
    branch after the other, a token is seen by the branches that go on from it."""
    causal: bool = field(default=True, metadata={'static': True})
    pattern: Pattern = field(default=Dense(), metadata={'static': True})
    whole: bool = field(default=False, metadata={'static': True})
    """Every row is known to be one segment: a kernel may leave segments out."""

    @property
    def one_sided(self) -> bool:
        """No query sees a key that stands behind it in the row."""
        return self.causal and self.prefix_BS is None and self.key_place_BS is None

    def dense(self) -> Bool[Array, 'B T S']:
        """The whole mask, True where the query sees the key: the reference of all backends."""
        query_BT1 = _places(self.query_place_BT, self.query_segment_BT)[:, :, None]
        key_B1S = _places(self.key_place_BS, self.key_segment_BS)[:, None, :]
        seen_BTS = self.query_segment_BT[:, :, None] == self.key_segment_BS[:, None, :]
        if self.causal:
            before_BTS = query_BT1 >= key_B1S
            if self.prefix_BS is None:
                seen_BTS &= before_BTS
            else:
                seen_BTS &= before_BTS | (self.prefix_BS != 0)[:, None, :]
        if self.until_BS is not None:
            seen_BTS &= query_BT1 < self.until_BS[:, None, :]
        if self.pattern != Dense():
            seen_BTS &= self.pattern.allows(query_BT1, key_B1S)
        return seen_BTS


def _places(place_BT: jax.Array | None, segment_BT: jax.Array) -> jax.Array:
    return jnp.arange(segment_BT.shape[1])[None] if place_BT is None else place_BT


def across(query_segment_BT: jax.Array, key_segment_BS: jax.Array) -> Visibility:
    """From one sequence to another: a query of segment k sees all of segment k there.

    Padding looks at the segment of the first key, so that it is not without one.
    """
    segment_BT = jnp.where(query_segment_BT == 0, key_segment_BS[:, :1], query_segment_BT)
    return Visibility(segment_BT, key_segment_BS, causal=False)

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
    itself, so that no query is without a key. Keys stand at places 0, 1, ... of the row; queries
    at `query_start`, `query_start` + 1, ... (0 without a cache).
    """

    query_segment_BT: Int[Array, 'B T']
    key_segment_BS: Int[Array, 'B S']
    query_start: Int[Array, ''] | int = 0
    prefix_BS: Int[Array, 'B S'] | None = None
    """Not 0: a key that every query of its segment sees."""
    first_B: Int[Array, ' B'] | None = None
    """Place from which a pattern counts (default: 0). A row of a cache may stand behind padding."""
    causal: bool = field(default=True, metadata={'static': True})
    pattern: Pattern = field(default=Dense(), metadata={'static': True})
    whole: bool = field(default=False, metadata={'static': True})
    """Every row is known to be one segment: a kernel may leave segments out."""

    @property
    def one_sided(self) -> bool:
        """No query sees a key that comes after it."""
        return self.causal and self.prefix_BS is None

    def dense(self) -> Bool[Array, 'B T S']:
        """The whole mask, True where the query sees the key: the reference of all backends."""
        T, S = self.query_segment_BT.shape[1], self.key_segment_BS.shape[1]
        query_T, key_S = self.query_start + jnp.arange(T), jnp.arange(S)
        seen_BTS = self.query_segment_BT[:, :, None] == self.key_segment_BS[:, None, :]
        if self.causal:
            before_TS = query_T[:, None] >= key_S
            if self.prefix_BS is None:
                seen_BTS &= before_TS
            else:
                seen_BTS &= before_TS | (self.prefix_BS != 0)[:, None, :]
        if self.pattern != Dense():
            first_B11 = 0 if self.first_B is None else self.first_B[:, None, None]
            seen_BTS &= self.pattern.allows(query_T[:, None] - first_B11, key_S - first_B11)
        return seen_BTS


def across(query_segment_BT: jax.Array, key_segment_BS: jax.Array) -> Visibility:
    """From one sequence to another: a query of segment k sees all of segment k there.

    Padding looks at the segment of the first key, so that it is not without one.
    """
    segment_BT = jnp.where(query_segment_BT == 0, key_segment_BS[:, :1], query_segment_BT)
    return Visibility(segment_BT, key_segment_BS, causal=False)

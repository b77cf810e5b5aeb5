"""Which keys a query may see."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visibility:
    """A query sees the keys of its own segment that do not come after it.

    Segments number the documents packed into a row, from 1; padding is segment 0, which sees only
    itself, so that no query is without a key. Keys stand at places 0, 1, ... of the row; queries
    at `query_start`, `query_start` + 1, ... (0 without a cache).
    """

    query_segment_BT: Int[Array, 'B T']
    key_segment_BS: Int[Array, 'B S']
    query_start: Int[Array, ''] | int = 0

    def dense(self) -> Bool[Array, 'B T S']:
        """The whole mask, True where the query sees the key."""
        T, S = self.query_segment_BT.shape[1], self.key_segment_BS.shape[1]
        query = self.query_start + jnp.arange(T)
        causal_TS = query[:, None] >= jnp.arange(S)
        same_BTS = self.query_segment_BT[:, :, None] == self.key_segment_BS[:, None, :]
        return same_BTS & causal_TS

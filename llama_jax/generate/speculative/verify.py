"""Verification: which drafted tokens are accepted, and what replaces the first that is rejected."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llama_jax.generate import decode as decode_lib
from llama_jax.generate.decode import Drawn
from llama_jax.generate.finite import NOT_FINITE, finite
from llama_jax.generate.sampling import INSTEAD, TRIAL, distribution, draw_from, sample, uniform
from llama_jax.generate.settings import History, Settings, is_end, shaped
from llama_jax.generate.speculative.draft import Drafted


@dataclass(frozen=True)
class Speculation:
    """How speculative decoding went in one row, after its first token."""

    steps: int
    """Runs of the model while the row was not done."""
    tokens: int
    """That they gave."""
    drafted: int
    accepted: int
    """Drafts that are part of the text."""

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Without speculation it is 1."""
        return self.tokens / self.steps if self.steps else 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """Of each row: see Speculation."""

    step_B: Int[Array, ' B']
    token_B: Int[Array, ' B']
    drafted_B: Int[Array, ' B']
    accepted_B: Int[Array, ' B']

    def of(self, row: int) -> Speculation:
        """Of one row; on the host."""
        return Speculation(*(int(x[row]) for x in vars(self).values()))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """All that is known of the rows but their keys and values; see State."""

    token_B: Int[Array, ' B']
    position_B: Int[Array, ' B']
    done_B: Bool[Array, ' B']
    history: History | None
    text_BS: Int[Array, 'B S']
    """Tokens by place."""
    drawn: Drawn
    counts: Counts


def verify(
    logits_BTV: jax.Array,
    draft: Drafted,
    settings: Settings,
    start_B: jax.Array,
    rows: Rows,
    *,
    pad_id: int,
    n_top: int | None,
) -> Rows:
    """The rows with the drafts that hold, and with one more token of the model's own."""
    B, T, V = logits_BTV.shape
    place_BT = rows.position_B[:, None] + 1 + jnp.arange(T)
    # Every place as a row of its own.
    each = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), settings)
    place_R, history = place_BT.reshape(-1), _histories(rows.history, draft.token_BK)
    logits_RV = shaped(logits_BTV.reshape(-1, V), each, history, place_R)
    if draft.probability_BKV is None:
        # Drawn as ever, at every place: a draft holds where it is what is drawn.
        token_BT = sample(logits_RV, each, place_R).reshape(B, T)
        holds_BK = token_BT[:, :-1] == draft.token_BK
        n_held_B = _n_first(holds_BK & (jnp.arange(T - 1) < draft.n_B[:, None]))
    else:
        probability_BTV = distribution(logits_RV, each).reshape(B, T, V)
        token_BT, n_held_B = _tried(probability_BTV, draft, settings, each, place_BT)

    finite_BT = finite(logits_BTV)
    token_BT = jnp.where(finite_BT, token_BT, NOT_FINITE)
    ended_BT = is_end(each, token_BT.reshape(-1)).reshape(B, T) | ~finite_BT
    ended_BT |= place_BT >= settings.last_B[:, None]
    n_held_B = jnp.where(rows.done_B, -1, n_held_B)
    # Up to the first end among those that hold and the one after them.
    n_before_B = _n_first(~ended_BT & (jnp.arange(T) <= n_held_B[:, None]))
    n_new_B = jnp.where(rows.done_B, 0, jnp.minimum(n_before_B, n_held_B) + 1)
    new_BT = jnp.arange(T) < n_new_B[:, None]
    token_BT = jnp.where(new_BT, token_BT, pad_id)

    row_B1, live_B = jnp.arange(B)[:, None], ~rows.done_B
    nowhere = jnp.iinfo(jnp.int32).max
    scored = decode_lib.scored(logits_BTV, token_BT, settings, n_top)
    at_BT = jnp.where(new_BT, place_BT - start_B[:, None] - 1, nowhere)
    newest_B1 = jnp.take_along_axis(token_BT, jnp.maximum(n_new_B - 1, 0)[:, None], axis=1)
    history = rows.history
    if history is not None:
        count_BV = history.count_BV.at[row_B1, token_BT].add(new_BT.astype(jnp.int32))
        history = History(history.prompt_BV, count_BV)
    counts = rows.counts
    return Rows(
        token_B=jnp.where(live_B, jnp.maximum(newest_B1[:, 0], 0), rows.token_B),
        position_B=rows.position_B + n_new_B,
        done_B=rows.done_B | (ended_BT & new_BT).any(axis=1),
        history=history,
        text_BS=rows.text_BS.at[row_B1, jnp.where(new_BT, place_BT, nowhere)].set(
            token_BT, mode='drop'
        ),
        drawn=jax.tree.map(
            lambda all_, x: all_.at[row_B1, at_BT].set(x, mode='drop'), rows.drawn, scored
        ),
        counts=Counts(
            step_B=counts.step_B + live_B,
            token_B=counts.token_B + n_new_B,
            drafted_B=counts.drafted_B + draft.n_B,
            accepted_B=counts.accepted_B + jnp.minimum(n_new_B, jnp.maximum(n_held_B, 0)),
        ),
    )


def _tried(
    probability_BTV: jax.Array,
    draft: Drafted,
    settings: Settings,
    each: Settings,
    place_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Tokens, and how many of them are drafts that hold (Leviathan et al. 2023, algorithm 1).

    A draft x holds with probability min(1, p(x) / q(x)), p being the model's and q that of the
    draft. The first that does not is replaced by a draw from what p has above q; after the last,
    p itself is drawn from. So each token is drawn from p.
    """
    B, T, V = probability_BTV.shape
    q_BKV = draft.probability_BKV
    assert q_BKV is not None
    index_BK1 = draft.token_BK[..., None]
    p_BK, q_BK = (
        jnp.take_along_axis(x, index_BK1, axis=-1)[..., 0] for x in (probability_BTV[:, :-1], q_BKV)
    )
    trial_BT = uniform(each, place_BT.reshape(-1), purpose=TRIAL).reshape(B, T)
    holds_BK = trial_BT[:, :-1] * q_BK < p_BK
    n_held_B = _n_first(holds_BK & (jnp.arange(T - 1) < draft.n_B[:, None]))
    at_B11 = n_held_B[:, None, None]
    p_BV = jnp.take_along_axis(probability_BTV, at_B11, axis=1)[:, 0]
    q_BV = jnp.take_along_axis(jnp.pad(q_BKV, ((0, 0), (0, 1), (0, 0))), at_B11, axis=1)[:, 0]
    tried_B1 = (n_held_B < draft.n_B)[:, None]
    above_BV = jnp.maximum(p_BV - jnp.where(tried_B1, q_BV, 0), 0)
    # Rounding may leave nothing above q, where p and q are the same.
    above_BV = jnp.where(above_BV.sum(axis=1, keepdims=True) > 0, above_BV, p_BV)
    place_B = jnp.take_along_axis(place_BT, n_held_B[:, None], axis=1)[:, 0]
    instead_B = draw_from(above_BV, settings, place_B, purpose=INSTEAD)
    drafted_BT = jnp.pad(draft.token_BK, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(T) < n_held_B[:, None], drafted_BT, instead_B[:, None]), n_held_B


def _histories(history: History | None, draft_BK: jax.Array) -> History | None:
    """What penalties look at before each draft and after the last, every place as a row."""
    if history is None:
        return None
    V = history.count_BV.shape[1]
    more_BKV = jnp.cumsum(jax.nn.one_hot(draft_BK, V, dtype=jnp.int32), axis=1)
    more_BTV = jnp.pad(more_BKV, ((0, 0), (1, 0), (0, 0)))
    count_BTV = history.count_BV[:, None] + more_BTV
    return History(
        jnp.repeat(history.prompt_BV, more_BTV.shape[1], axis=0), count_BTV.reshape(-1, V)
    )


def _n_first(true_BT: jax.Array) -> jax.Array:
    """How many are true before the first that is not."""
    return jnp.cumprod(true_BT.astype(jnp.int32), axis=1).sum(axis=1)

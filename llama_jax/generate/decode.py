"""The compiled programs of generation: read a piece of the prompts, draw the first tokens, and
write more in one loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout, precision
from llama_jax.generate import columns
from llama_jax.generate.finite import NOT_FINITE, finite
from llama_jax.generate.sampling import sample
from llama_jax.generate.settings import History, Settings, is_end, shaped
from llama_jax.model import heads, layers
from llama_jax.model.cache import Cache, Cross
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import HEADS, Params
from llama_jax.model.transformer import Memory


@dataclass(frozen=True)
class Model:
    """What is fixed when a program is compiled."""

    config: ModelConfig
    compute: Compute
    in_columns: bool
    """It runs by columns.py, and weights are arranged for it."""
    pad_id: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a step of decoding needs and makes; donated, so that the cache stays in place."""

    cache: Cache
    token_B: Int[Array, ' B']
    """The newest token of each row, not in the cache yet; some id for NOT_FINITE, so that what a
    row that is done goes on to write are numbers."""
    position_B: Int[Array, ' B']
    """Its place. A row that is done keeps both."""
    done_B: Bool[Array, ' B']
    """The row has met an end id, has all its tokens, or holds no prompt."""
    history: History | None
    text_BS: Int[Array, 'B S'] | None = None
    """Tokens by place, where a running batch drafts; else None."""
    draft_BK: Int[Array, 'B K'] | None = None
    """What heads of the model draft behind the newest token, where they do; -1: nothing yet."""

    def without(self, dead_B: Bool[Array, ' B']) -> State:
        """The same, with these rows done as well."""
        return replace(self, done_B=self.done_B | jax.reshard(dead_B, layout.rows()))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """Tokens that a program drew, and how likely they and the likeliest were, where asked for: by
    the logits as the model gives them."""

    token_BT: Int[Array, 'B T']
    """What a row has after its end is padding; its last may be NOT_FINITE."""
    logprob_BT: Float[Array, 'B T'] | None = None
    top_BTR: Int[Array, 'B T R'] | None = None
    top_logprob_BTR: Float[Array, 'B T R'] | None = None
    """Best first."""


Carry = tuple[jax.Array, State, Drawn]
"""Steps taken, state, and what was drawn."""


def features(
    model: Model,
    params: Params,
    token_BT: Int[Array, 'B T'],
    *,
    cache: Cache | None = None,
    at_B: Int[Array, ' B'] | None = None,
    length_B: Int[Array, ' B'] | None = None,
    position_BT: Int[Array, 'B T'] | None = None,
    until_BS: Int[Array, 'B S'] | None = None,
    segment_BT: Int[Array, 'B T'] | None = None,
    causal: bool = True,
) -> tuple[Float[Array, 'B T D'], Cache | None]:
    """What the output head reads, of tokens from place `at_B` on (None: the first), and the cache
    with them, that of heads which draft included.

    Rows stand at the left: what a row has after its last token is padding, which nothing sees and
    later tokens overwrite. `length_B`: without it, where no cache says it. `position_BT` and
    `until_BS`: of trees, see Transformer.features. Not `causal`, every token sees its segment.
    """
    how: dict[str, Any] = {'at_B': at_B, 'length_B': length_B, 'position_BT': position_BT}
    how |= {'until_BS': until_BS, 'segment_BT': segment_BT, 'causal': causal}
    x_JBTD, cache = of_heads(model, params, token_BT, cache=cache, **how)
    return x_JBTD[0], cache


def of_heads(
    model: Model,
    params: Params,
    token_BT: Int[Array, 'B T'],
    *,
    cache: Cache | None,
    **where: Any,
) -> tuple[Float[Array, 'J B T D'], Cache | None]:
    """`features`, and behind them those of each head that drafts, where there is a cache for it;
    one that nobody reads costs its keys and values alone."""
    with precision.matmuls(model.compute.precision):
        how: dict[str, Any] = {**where, 'cache': cache, 'compute': model.compute}
        beside = params.get(HEADS, {}) if cache is not None else {}
        if model.in_columns:
            return columns.features(model.config, params, token_BT, beside=beside, **how)
        blocks = heads.bind(model.config, beside)
        bound = layers.bind(model.config, params)
        x, cache = bound.features(token_BT, beside=blocks, **how)
        return x if blocks else x[None], cache


def read(
    model: Model,
    params: Params,
    cache: Cache,
    token_BT: Int[Array, 'B T'],
    at_B: Int[Array, ' B'] | None,
) -> tuple[Float[Array, 'B T D'], Cache]:
    """`features` of a piece of the prompts, which is written into the cache."""
    x_BTD, written = features(model, params, token_BT, cache=cache, at_B=at_B)
    assert written is not None  # given a cache, a model returns one
    return x_BTD, written


def encode(
    model: Model, params: Params, token_BS: Int[Array, 'B S'], length_B: Int[Array, ' B']
) -> Cross:
    """Read sources of these lengths, and compute what the decoder attends to at every step."""
    memory = understood(model, params, token_BS, length_B)
    with precision.matmuls(model.compute.precision):
        return layers.bind(model.config, params).cross(memory)


def understood(
    model: Model, params: Params, token_BS: Int[Array, 'B S'], length_B: Int[Array, ' B']
) -> Memory:
    """What the encoder makes of sources of these lengths. A row without a source has one token of
    padding, so that it is not without a key."""
    segment_BS = jnp.arange(token_BS.shape[1]) < jnp.maximum(length_B, 1)[:, None]
    with precision.matmuls(model.compute.precision):
        return layers.bind(model.config, params).encode(
            token_BS, segment_BS=segment_BS.astype(jnp.int32), compute=model.compute
        )


def last_features(
    x_BD: Float[Array, 'B D'], x_BTD: Float[Array, 'B T D'], last_B: Int[Array, ' B']
) -> Float[Array, 'B D']:
    """Features of each row's last token: those of this piece for the rows whose last token
    `last_B`, counted from the piece's beginning, is in it; else `x_BD`."""
    T = x_BTD.shape[1]
    at_B11 = jnp.clip(last_B, 0, T - 1)[:, None, None]
    # A comparison, not an index: rows may lie on several devices.
    here_BTD = jnp.where(jnp.arange(T)[:, None] == at_B11, x_BTD, 0)
    return jnp.where(((last_B >= 0) & (last_B < T))[:, None], here_BTD.sum(axis=1), x_BD)


def begin(
    model: Model,
    params: Params,
    cache: Cache,
    x_BD: Float[Array, 'B D'],
    length_B: Int[Array, ' B'],
    settings: Settings,
    history: History | None,
    *,
    n_top: int | None,
) -> tuple[State, Drawn]:
    """Draw the first tokens, after prompts of these lengths (0: no prompt). The head, the dearest
    product of a small model, is applied to the last position only."""
    logits_BV = head(model, params, x_BD[:, None])[:, 0]
    live_B = length_B > 0
    one, ended_B, history = draw(
        logits_BV, settings, history, length_B, live_B, pad_id=model.pad_id, n_top=n_top
    )
    token_B = jnp.maximum(one.token_BT, 0)
    state = State(cache, token_B, length_B, ended_B | ~live_B, history)
    return state, jax.tree.map(lambda x: jnp.expand_dims(x, 1), one)


def decode(
    model: Model,
    params: Params,
    state: State,
    settings: Settings,
    n_steps: Int[Array, ''],
    *,
    slots: int,
    n_top: int | None,
) -> tuple[State, Drawn]:
    """Draw up to `n_steps` (<= `slots`) more tokens of each row in one loop on the device.

    It ends early when every row is done. `n_top`: with log-probabilities, of so many likeliest
    tokens as well; None: without.
    """

    def unfinished(carry: Carry) -> jax.Array:
        n, state, _ = carry
        return (n < n_steps) & ~state.done_B.all()

    def one_step(carry: Carry) -> Carry:
        n, state, drawn = carry
        logits_BV, cache = step(model, params, state.token_B, state.position_B, state.cache)
        state, one = choose(
            *(model, replace(state, cache=cache), logits_BV, settings, ~state.done_B), n_top=n_top
        )
        drawn = jax.tree.map(
            lambda all_, x: jax.lax.dynamic_update_slice_in_dim(all_, x, n, axis=1), drawn, one
        )
        return n + 1, state, drawn

    empty = nothing(len(state.token_B), slots, model.pad_id, n_top)
    _, state, drawn = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), state, empty))
    return state, drawn


def step(
    model: Model,
    params: Params,
    token_B: Int[Array, ' B'],
    position_B: Int[Array, ' B'],
    cache: Cache,
) -> tuple[Float[Array, 'B V'], Cache]:
    """Float32 logits after one more token in each row, and the cache with it."""
    logits_BTV, cache = following(model, params, cache, token_B[:, None], position_B)
    return logits_BTV[:, 0], cache


def choose(
    model: Model,
    state: State,
    logits_BV: Float[Array, 'B V'],
    settings: Settings,
    live_B: Bool[Array, ' B'],
    *,
    n_top: int | None,
) -> tuple[State, Drawn]:
    """Draw one more token of each row that lives, from its logits; the others stay as they are."""
    position_B = state.position_B + 1
    one, ended_B, history = draw(
        *(logits_BV, settings, state.history, position_B, live_B), pad_id=model.pad_id, n_top=n_top
    )
    token_B = jnp.where(live_B, jnp.maximum(one.token_BT, 0), state.token_B)
    text_BS = state.text_BS
    if text_BS is not None:
        here_BS = (jnp.arange(text_BS.shape[1]) == position_B[:, None]) & live_B[:, None]
        text_BS = jnp.where(here_BS, token_B[:, None], text_BS)
    draft_BK = state.draft_BK
    if draft_BK is not None:  # what was drafted stood behind another token
        draft_BK = jnp.where(live_B[:, None], -1, draft_BK)
    state = replace(
        state,
        token_B=token_B,
        position_B=jnp.where(live_B, position_B, state.position_B),
        done_B=state.done_B | (ended_B & live_B),
        history=history,
        text_BS=text_BS,
        draft_BK=draft_BK,
    )
    return state, jax.tree.map(lambda x: jnp.expand_dims(x, 1), one)


def following(
    model: Model,
    params: Params,
    cache: Cache,
    token_BT: Int[Array, 'B T'],
    at_B: Int[Array, ' B'],
) -> tuple[Float[Array, 'B T V'], Cache]:
    """Float32 logits after each of a few more tokens, which are written from place `at_B` on."""
    x_BTD, cache = read(model, params, cache, token_BT, at_B)
    return head(model, params, x_BTD), cache


def head(model: Model, params: Params, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """Float32 logits."""
    with precision.matmuls(model.compute.precision):
        if model.in_columns:
            return columns.logits(model.config, params, x_BTD)
        return layers.bind(model.config, params).logits(x_BTD)


def draw(
    logits_BV: Float[Array, 'B V'],
    settings: Settings,
    history: History | None,
    position_B: Int[Array, ' B'],
    live_B: Bool[Array, ' B'],
    *,
    pad_id: int,
    n_top: int | None,
) -> tuple[Drawn, Bool[Array, ' B'], History | None]:
    """The tokens at `position_B` (padding in rows that do not live), without their dimension T;
    which of them are the last of their row; and the history with them. Where the logits are no
    numbers it is NOT_FINITE, the last of its row.

    Each device draws for its own rows, and needs their whole vocabulary.
    """

    def draw_rows(
        logits_BV: jax.Array,
        settings: Settings,
        history: History | None,
        position_B: jax.Array,
        live_B: jax.Array,
    ) -> tuple[Drawn, jax.Array, History | None]:
        token_B = sample(shaped(logits_BV, settings, history, position_B), settings, position_B)
        finite_B = finite(logits_BV)
        token_B = jnp.where(live_B, jnp.where(finite_B, token_B, NOT_FINITE), pad_id)
        ended_B = is_end(settings, token_B) | ~finite_B | (position_B >= settings.last_B)
        if history is not None:
            row_B = jnp.arange(len(token_B))
            count_BV = history.count_BV.at[row_B, token_B].add(live_B.astype(jnp.int32))
            history = History(history.prompt_BV, count_BV)
        one = scored(logits_BV[:, None], token_B[:, None], settings, n_top)
        return jax.tree.map(lambda x: x[:, 0], one), ended_B, history

    rows = layout.rows()
    return jax.shard_map(
        draw_rows,
        in_specs=rows,
        out_specs=rows,
        check_vma=False,  # carries of loops start as constants, which do not vary over the mesh
    )(jax.reshard(logits_BV, P(*rows, None)), settings, history, position_B, live_B)


def scores(logits_BTV: Float[Array, 'B T V'], token_BT: Int[Array, 'B T'], *, n_top: int) -> Drawn:
    """Log-probabilities of given tokens, and of the likeliest at their places."""
    log_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    logprob_BT1 = jnp.take_along_axis(log_BTV, token_BT[..., None], axis=-1)
    top_logprob_BTR, top_BTR = jax.lax.top_k(log_BTV, n_top)
    return Drawn(token_BT, logprob_BT1[..., 0], top_BTR, top_logprob_BTR)


def scored(
    logits_BTV: Float[Array, 'B T V'],
    token_BT: Int[Array, 'B T'],
    settings: Settings,
    n_top: int | None,
) -> Drawn:
    """`scores`, where some row wants them: else zeros, and tokens alone without `n_top`."""
    if n_top is None:
        return Drawn(token_BT)
    none, zero = jnp.zeros(token_BT.shape), jnp.zeros((*token_BT.shape, n_top))
    return jax.lax.cond(
        settings.reported_B.any(),
        lambda: scores(logits_BTV, token_BT, n_top=n_top),
        lambda: Drawn(token_BT, none, zero.astype(jnp.int32), zero),
    )


def nothing(B: int, T: int, pad_id: int, n_top: int | None) -> Drawn:
    """Empty places for `T` tokens of each row."""

    def full(value: float, dtype: type, *shape: int) -> jax.Array:
        placed = P(*layout.rows(), *[None] * len(shape))
        return jnp.full((B, *shape), value, dtype, out_sharding=placed)

    token_BT = full(pad_id, jnp.int32, T)
    if n_top is None:
        return Drawn(token_BT)
    return Drawn(
        token_BT,
        full(0, jnp.float32, T),
        full(0, jnp.int32, T, n_top),
        full(0, jnp.float32, T, n_top),
    )

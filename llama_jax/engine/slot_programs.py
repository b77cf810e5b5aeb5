"""Programs on one slot of a running batch: read a piece of its prompt, let it begin, copy it; and
some decode steps of all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.generate import decode as decode_lib
from llama_jax.generate.controls import MOST_LOGPROBS
from llama_jax.generate.decode import Drawn, Model, State
from llama_jax.generate.settings import History, Settings
from llama_jax.generate.speculative.draft import Lookup
from llama_jax.generate.speculative.loop import draw_some
from llama_jax.generate.speculative.verify import Counts
from llama_jax.model.cache import Cache, placed
from llama_jax.model.layers import Params

# Of a cache the batch and the key-value heads are divided; of all else the batch is.
_CACHE, _ROWS = layout.act('BK'), layout.rows()


class SlotPrograms:
    """The programs that a running batch needs, each compiled at its first use.

    What they change is donated: the state, and the settings where these change.
    """

    def __init__(self, model: Model, *, steps: int, lookup: Lookup | None = None):
        """`steps` may be done per dispatch, each of one token a row or, with `lookup`, of some."""

        def some(
            params: Params,
            state: State,
            settings: Settings,
            dead_B: jax.Array,
            n: jax.Array,
            may_guess: jax.Array,
        ) -> tuple[State, Drawn, Counts | None]:
            given = (params, state.without(dead_B), settings, n)
            if lookup is None:
                drawn = decode_lib.decode(model, *given, slots=steps, n_top=MOST_LOGPROBS)
                return *drawn, None
            slots = steps * (lookup.n_draft + 1)
            return draw_some(model, lookup, *given, may_guess, slots=slots, n_top=MOST_LOGPROBS)

        state_goes = functools.partial(jax.jit, donate_argnums=1)
        self.read = state_goes(functools.partial(read_row, model), static_argnames='first')
        self.read_source = state_goes(functools.partial(read_source, model))
        self.begin = jax.jit(
            functools.partial(begin_row, model, n_top=MOST_LOGPROBS), donate_argnums=(1, 2)
        )
        self.copy = jax.jit(copy_row, donate_argnums=0)
        self.clear = jax.jit(clear_row, donate_argnums=0)
        self.put_bias = jax.jit(put_bias, donate_argnums=0)
        self.steps = state_goes(some)
        self.scores = jax.jit(functools.partial(scores_of, model))


def read_row(
    model: Model,
    params: Params,
    state: State,
    row: Int[Array, ''],
    token_BT: Int[Array, '1 T'],
    at: Int[Array, ''],
    limit: Int[Array, ''],
    *,
    first: bool,
) -> tuple[State, Float[Array, '1 T D']]:
    """Read a piece of a prompt into one row, from place `at` on; the row is done until it begins.
    Its text will have `limit` tokens at most.

    The other rows go on between pieces. Their steps write this row too: at the place where its
    next piece begins, before that is written.
    """
    own = _take(state.cache, row, placed(state.cache))
    at_B, kept = _batch_of_one(at), state.cache
    if kept.length_B is not None:
        own = replace(own, length_B=_batch_of_one(limit))
        kept = replace(kept, length_B=_put(kept.length_B, own.length_B, row, _ROWS))
    x_BTD, own = decode_lib.read(model, params, own, token_BT, None if first else at_B)
    state = replace(
        state,
        cache=replace(kept, layers=_put(kept.layers, own.layers, row, _CACHE)),
        position_B=_put(state.position_B, at_B + token_BT.shape[1], row, _ROWS),
        done_B=_put(state.done_B, _batch_of_one(jnp.array(True)), row, _ROWS),
    )
    return state, x_BTD


def read_source(
    model: Model,
    params: Params,
    state: State,
    row: Int[Array, ''],
    token_BS: Int[Array, '1 S'],
    length: Int[Array, ''],
) -> State:
    """What the encoder makes of a source of `length` tokens in one row; the row is done until it
    begins."""
    kept = state.cache.cross
    assert kept is not None  # an engine for an encoder-decoder makes room for it
    own = decode_lib.encode(model, params, token_BS, _batch_of_one(length))
    own = own.padded(kept.segment_BS.shape[1])
    return replace(
        state,
        cache=replace(state.cache, cross=_put(kept, own, row, placed(kept))),
        done_B=_put(state.done_B, _batch_of_one(jnp.array(True)), row, _ROWS),
    )


def begin_row(
    model: Model,
    params: Params,
    state: State,
    settings: Settings,
    row: Int[Array, ''],
    x_BTD: Float[Array, '1 T D'],
    last: Int[Array, ''],
    length: Int[Array, ''],
    own: Settings,
    history: History,
    text_BS: Int[Array, '1 S'] | None,
    *,
    n_top: int,
) -> tuple[State, Settings, Drawn]:
    """Draw the first token of a row whose prompt of `length` tokens is read, from the features of
    its last piece, at `last`; `own`, `history` and `text_BS` are of this row alone."""
    last_B, length_B = _batch_of_one(last), _batch_of_one(length)
    x_BD = decode_lib.last_features(jnp.zeros_like(x_BTD[:, 0]), x_BTD, last_B)
    begun, drawn = decode_lib.begin(
        *(model, params, Cache([]), x_BD, length_B, own, history), n_top=n_top
    )
    state = State(
        cache=state.cache,
        token_B=_put(state.token_B, begun.token_B, row, _ROWS),
        position_B=_put(state.position_B, begun.position_B, row, _ROWS),
        done_B=_put(state.done_B, begun.done_B, row, _ROWS),
        history=_put(state.history, begun.history, row, _ROWS),
        text_BS=None
        if text_BS is None
        else _put(state.text_BS, _written(text_BS, begun.token_B, length), row, _ROWS),
    )
    return state, _put(settings, own, row, _ROWS), drawn


def copy_row(state: State, source: Int[Array, ''], row: Int[Array, '']) -> State:
    """The keys and values of row `source` in another row too."""
    kept = state.cache.layers
    kept = _put(kept, _take(kept, source, _CACHE), row, _CACHE)
    return replace(state, cache=replace(state.cache, layers=kept))


def clear_row(state: State, row: Int[Array, '']) -> State:
    """Zeros as the keys and values of a row."""
    kept = state.cache.layers
    zeros = jax.tree.map(jnp.zeros_like, _take(kept, row, _CACHE))
    return replace(state, cache=replace(state.cache, layers=_put(kept, zeros, row, _CACHE)))


def scores_of(
    model: Model, params: Params, x_BTD: Float[Array, '1 T D'], token_BT: Int[Array, '1 T']
) -> Drawn:
    """Log-probabilities of the tokens that follow each of a piece with these features."""
    logits_BTV = decode_lib.head(model, params, x_BTD)
    whole = [jax.reshard(x, _ROWS) for x in (logits_BTV, token_BT)]
    scores = functools.partial(decode_lib.scores, n_top=MOST_LOGPROBS)
    return jax.shard_map(scores, in_specs=_ROWS, out_specs=_ROWS)(*whole)


def put_bias(settings: Settings, bias_BV: Float[Array, '1 V'], row: Int[Array, '']) -> Settings:
    """The settings with another bias in one row."""
    return Settings(
        **{**vars(settings), 'bias_BV': _put(settings.bias_BV, bias_BV, row, _ROWS)},
    )


def _written(text_BS: jax.Array, token_B: jax.Array, place: jax.Array) -> jax.Array:
    """The text of a batch of one with a token at a place."""
    return jnp.where(jnp.arange(text_BS.shape[1]) == place, token_B[:, None], text_BS)


def _take(tree: Any, row: jax.Array, spec: Any) -> Any:
    """One row of every array, as a batch of one."""

    def local(tree: Any, row: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), tree)

    return _on_each_device(local, (spec, P()), spec)(tree, row)


def _put(tree: Any, one: Any, row: jax.Array, spec: Any) -> Any:
    """Every array with one row replaced by that of a batch of one."""

    def local(tree: Any, one: Any, row: jax.Array) -> Any:
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), row, 0),
            *(tree, one),
        )

    return _on_each_device(local, (spec, spec, P()), spec)(tree, one, row)


def _batch_of_one(x: jax.Array) -> jax.Array:
    return jax.reshard(jnp.reshape(x, 1), _ROWS)


def _on_each_device(local: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)

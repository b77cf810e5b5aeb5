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
from jaxtyping import Array, Float, Int, UInt8

from llama_jax import layout
from llama_jax.generate import decode as decode_lib
from llama_jax.generate.controls import MOST_LOGPROBS
from llama_jax.generate.decode import Drawn, Model, State
from llama_jax.generate.settings import History, Settings, only
from llama_jax.generate.speculative.draft import Heads, Lookup
from llama_jax.generate.speculative.loop import draw_some
from llama_jax.generate.speculative.verify import Counts
from llama_jax.model.cache import Cache, apart, joined, placed
from llama_jax.model.layers import Params

# Of a cache the batch and the key-value heads are divided; of all else the batch is.
_CACHE, _ROWS = layout.act('BK'), layout.rows()


class SlotPrograms:
    """The programs that a running batch needs, each compiled at its first use.

    The cache of a batch lies in parts of some rows; all else of its state in one State whose cache
    is empty, the `rest`. What programs change is donated: parts of the cache, the rest, and the
    settings where these change.
    """

    def __init__(self, model: Model, *, steps: int, speculate: Lookup | Heads | None = None):
        """`steps` may be done per dispatch, each of one token a row or, with drafts, of some."""

        def some(
            params: Params,
            caches: list[Cache],
            rest: State,
            settings: Settings,
            slot_B: jax.Array | None,
            dead_B: jax.Array,
            n: jax.Array,
            may_draft: jax.Array,
        ) -> tuple[list[Cache], State, Drawn, Counts | None]:
            own = replace(_some(rest, slot_B), cache=joined(caches)).without(dead_B)
            given = (params, own, _some(settings, slot_B), n)
            counts = None
            if speculate is None:
                own, drawn = decode_lib.decode(model, *given, slots=steps, n_top=MOST_LOGPROBS)
            else:
                slots = steps * (speculate.n_draft + 1)
                own, drawn, counts = draw_some(
                    model, speculate, *given, may_draft, slots=slots, n_top=MOST_LOGPROBS
                )
            written = replace(own, cache=rest.cache)
            return apart(own.cache, caches), _put_some(rest, written, slot_B), drawn, counts

        def ahead(
            params: Params, caches: list[Cache], rest: State, slot_B: jax.Array | None
        ) -> tuple[list[Cache], jax.Array]:
            own = _some(rest, slot_B)
            logits_BV, cache = decode_lib.step(
                model, params, own.token_B, own.position_B, joined(caches)
            )
            return apart(cache, caches), logits_BV

        def choose(
            rest: State,
            settings: Settings,
            slot_B: jax.Array | None,
            logits_BV: jax.Array,
            allowed_BC: jax.Array,
            live_B: jax.Array,
        ) -> tuple[State, Drawn]:
            allowed_BC, live_B = (jax.reshard(x, _ROWS) for x in (allowed_BC, live_B))
            own, drawn = decode_lib.choose(
                *(model, _some(rest, slot_B), logits_BV),
                *(only(_some(settings, slot_B), allowed_BC), live_B),
                n_top=MOST_LOGPROBS,
            )
            return _put_some(rest, own, slot_B), drawn

        self.read = jax.jit(
            functools.partial(read_row, model), static_argnames='first', donate_argnums=(1, 2)
        )
        self.read_source = jax.jit(functools.partial(read_source, model), donate_argnums=(1, 2))
        self.begin = jax.jit(
            functools.partial(begin_row, model, n_top=MOST_LOGPROBS), donate_argnums=(1, 2)
        )
        self.copy = jax.jit(copy_row, donate_argnums=0)
        self.clear = jax.jit(clear_row, donate_argnums=0)
        self.steps = jax.jit(some, donate_argnums=(1, 2))
        self.ahead = jax.jit(ahead, donate_argnums=1)
        self.choose = jax.jit(choose, donate_argnums=0)
        self.scores = jax.jit(functools.partial(scores_of, model))


def read_row(
    model: Model,
    params: Params,
    cache: Cache,
    rest: State,
    row: Int[Array, ''],
    slot: Int[Array, ''],
    token_BT: Int[Array, '1 T'],
    at: Int[Array, ''],
    limit: Int[Array, ''],
    end: Int[Array, ''],
    *,
    first: bool,
) -> tuple[Cache, State, Float[Array, '1 T D']]:
    """Read a piece of a prompt into one slot, which is a row of a part of the cache, from place
    `at` on; the slot is done until it begins. Its text will have `limit` tokens at most.

    The other slots go on between pieces. Their steps may write this one too: at the place where its
    next piece begins, before that is written; or, in a row that holds what it has read, at the last
    place before `end`, where a step's drafts fit behind. Behind the row would be place 0, which
    other prompts may share.
    """
    own = _take(cache, row, placed(cache))
    at_B, kept = _batch_of_one(at), cache
    if kept.length_B is not None:
        own = replace(own, length_B=_batch_of_one(limit))
        kept = replace(kept, length_B=_put(kept.length_B, own.length_B, row, _ROWS))
    x_BTD, own = decode_lib.read(model, params, own, token_BT, None if first else at_B)
    rest = replace(
        rest,
        position_B=_put(
            rest.position_B, jnp.minimum(at_B + token_BT.shape[1], end - 1), slot, _ROWS
        ),
        done_B=_put(rest.done_B, _batch_of_one(jnp.array(True)), slot, _ROWS),
    )
    return replace(kept, layers=_put(kept.layers, own.layers, row, _CACHE)), rest, x_BTD


def read_source(
    model: Model,
    params: Params,
    cache: Cache,
    rest: State,
    row: Int[Array, ''],
    slot: Int[Array, ''],
    token_BS: Int[Array, '1 S'],
    length: Int[Array, ''],
) -> tuple[Cache, State]:
    """What the encoder makes of a source of `length` tokens in one slot; the slot is done until it
    begins."""
    kept = cache.cross
    assert kept is not None  # an engine for an encoder-decoder makes room for it
    own = decode_lib.encode(model, params, token_BS, _batch_of_one(length))
    own = own.padded(kept.segment_BS.shape[1])
    done_B = _put(rest.done_B, _batch_of_one(jnp.array(True)), slot, _ROWS)
    return replace(cache, cross=_put(kept, own, row, placed(kept))), replace(rest, done_B=done_B)


def begin_row(
    model: Model,
    params: Params,
    rest: State,
    settings: Settings,
    slot: Int[Array, ''],
    x_BTD: Float[Array, '1 T D'],
    last: Int[Array, ''],
    length: Int[Array, ''],
    own: Settings,
    allowed_BC: UInt8[Array, '1 C'],
    history: History,
    text_BS: Int[Array, '1 S'] | None,
    *,
    n_top: int,
) -> tuple[State, Settings, Drawn]:
    """Draw the first token of a slot whose prompt of `length` tokens is read, from the features of
    its last piece, at `last`; `own`, `history` and `text_BS` are of this slot alone. The token is
    one of those that are allowed (see settings.only)."""
    last_B, length_B = _batch_of_one(last), _batch_of_one(length)
    x_BD = decode_lib.last_features(jnp.zeros_like(x_BTD[:, 0]), x_BTD, last_B)
    begun, drawn = decode_lib.begin(
        *(model, params, Cache([]), x_BD, length_B, only(own, allowed_BC), history), n_top=n_top
    )
    rest = State(
        cache=rest.cache,
        token_B=_put(rest.token_B, begun.token_B, slot, _ROWS),
        position_B=_put(rest.position_B, begun.position_B, slot, _ROWS),
        done_B=_put(rest.done_B, begun.done_B, slot, _ROWS),
        history=_put(rest.history, begun.history, slot, _ROWS),
        text_BS=None
        if text_BS is None
        else _put(rest.text_BS, _written(text_BS, begun.token_B, length), slot, _ROWS),
        draft_BK=None
        if rest.draft_BK is None
        else _put(rest.draft_BK, jnp.full_like(rest.draft_BK[:1], -1), slot, _ROWS),
    )
    return rest, _put(settings, own, slot, _ROWS), drawn


def copy_row(
    cache: Cache, row: Int[Array, ''], source: Cache | None, source_row: Int[Array, '']
) -> Cache:
    """A part of the cache with keys and values from another part (None: the same) in one row."""
    taken = _take((cache if source is None else source).layers, source_row, _CACHE)
    return replace(cache, layers=_put(cache.layers, taken, row, _CACHE))


def clear_row(cache: Cache, row: Int[Array, '']) -> Cache:
    """Zeros as the keys and values of a row."""
    zeros = jax.tree.map(jnp.zeros_like, _take(cache.layers, row, _CACHE))
    return replace(cache, layers=_put(cache.layers, zeros, row, _CACHE))


def scores_of(
    model: Model, params: Params, x_BTD: Float[Array, '1 T D'], token_BT: Int[Array, '1 T']
) -> Drawn:
    """Log-probabilities of the tokens that follow each of a piece with these features."""
    logits_BTV = decode_lib.head(model, params, x_BTD)
    whole = [jax.reshard(x, _ROWS) for x in (logits_BTV, token_BT)]
    scores = functools.partial(decode_lib.scores, n_top=MOST_LOGPROBS)
    return jax.shard_map(scores, in_specs=_ROWS, out_specs=_ROWS)(*whole)


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


def _some(tree: Any, row_B: jax.Array | None) -> Any:
    """These rows of every array; None: all."""
    if row_B is None:
        return tree

    def local(tree: Any, row_B: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[row_B], tree)

    return _on_each_device(local, (_ROWS, P()), _ROWS)(tree, row_B)


def _put_some(tree: Any, some: Any, row_B: jax.Array | None) -> Any:
    """Every array with these rows replaced; None: all."""
    if row_B is None:
        return some

    def local(tree: Any, some: Any, row_B: jax.Array) -> Any:
        return jax.tree.map(lambda x, new: x.at[row_B].set(new), tree, some)

    return _on_each_device(local, (_ROWS, _ROWS, P()), _ROWS)(tree, some, row_B)


def _batch_of_one(x: jax.Array) -> jax.Array:
    return jax.reshard(jnp.reshape(x, 1), _ROWS)


def _on_each_device(local: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)

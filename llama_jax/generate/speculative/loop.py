"""The loop of speculative decoding: several tokens are drafted, and one run of the model verifies
how many of them it would have drawn itself.

A rejected token costs nothing but its column: the cache is by place, and the next tokens overwrite
it. All of it is one loop on the device; rows accept independently of each other. A running batch
does some steps of it at a time (`draw_some`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from llama_jax.errors import UserError
from llama_jax.generate import decode as decode_lib
from llama_jax.generate.decode import Drawn, Model, State
from llama_jax.generate.prefill import Shape, padded, prefill, shape_of
from llama_jax.generate.programs import Programs, bucket
from llama_jax.generate.settings import Settings
from llama_jax.generate.speculative.draft import (
    ByModel,
    Draft,
    Drafted,
    Heads,
    Lookup,
    draft_by,
    expected,
    look_up,
    on_rows,
)
from llama_jax.generate.speculative.verify import Counts, Rows, verify
from llama_jax.model.cache import Cache
from llama_jax.model.layers import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Carry:
    cache: Cache
    own: Cache | None
    """Of the small model: what the row holds before its newest token."""
    rows: Rows
    draft_BK: jax.Array | None
    """See State."""


def check(programs: Programs, how: Lookup | Heads | Draft, *, longest: int) -> None:
    """Raise UserError when `how` cannot draft for this model and texts of `longest` tokens."""
    if isinstance(how, Lookup):
        return
    if isinstance(how, Heads):
        if how.n_draft > programs.heads:
            raise UserError(
                f'speculate: {how.n_draft} heads are to draft, and the model has {programs.heads} '
                'beside its own: only one that MultiToken trained has any, and they are loaded '
                'where --draft heads says so'
            )
        return
    if not isinstance(how, Draft):
        raise UserError(f'speculate {how!r}: give a Lookup, Heads or a Draft')
    ours, theirs = programs.config, how.programs.config
    if theirs.encoder_layers:
        raise UserError('speculate: the small model has an encoder: use one without')
    if ours.vocab != theirs.vocab:
        raise UserError(
            f'speculate: the small model has a vocabulary of {theirs.vocab}, the large one of '
            f'{ours.vocab}: they need the same tokenizer'
        )
    if longest > theirs.context:
        raise UserError(
            f'speculate: the small model has a context of {theirs.context}, and prompt and '
            f'max_tokens are {longest}: shorten one of them'
        )
    if programs.mesh != how.programs.mesh:
        raise UserError('speculate: make the programs of the small model on the same mesh')


def draw_rest(
    programs: Programs,
    how: Lookup | Heads | Draft,
    prompts: Sequence[Sequence[int]],
    shape: Shape,
    state: State,
    first: Drawn,
    settings: Settings,
    *,
    limits: Sequence[int],
    n_more: int,
    n_top: int | None,
) -> tuple[Drawn, Counts]:
    """What `decode` would draw after the `first` tokens, in fewer runs of the model; up to `n_more`
    tokens a row, so that its text has `limits`. The cache has room for `how.n_draft` tokens behind
    them."""
    text_BT, length_B = padded(
        prompts, shape.rows, bucket(shape.prompt + n_more + 1), programs.model.pad_id
    )
    row_B = np.arange(shape.rows)
    text_BT[row_B, length_B] = np.asarray(first.token_BT)[:, 0]
    drafter: Lookup | Heads | ByModel
    params, own = None, None
    if isinstance(how, Lookup | Heads):
        drafter = how
        if isinstance(how, Heads):
            nothing_BK = np.full((shape.rows, how.n_draft), -1, np.int32)
            state = replace(state, draft_BK=programs.place(nothing_BK))
    else:
        drafter, params = ByModel(how.programs.model, how.n_draft), how.programs.params
        small = shape_of(
            how.programs,
            prompts=len(prompts),
            longest=max(map(len, prompts)),
            max_tokens=n_more + 1 + how.n_draft,
            prefill_chunk=shape.piece,
        )
        _, own, _ = prefill(how.programs, prompts, small, limits=limits)
    done = _run(
        *(programs.model, drafter, programs.params, params, state, programs.place(text_BT), own),
        settings,
        slots=bucket(n_more),
        n_top=n_top,
    )
    return done.rows.drawn, done.rows.counts


@functools.partial(
    jax.jit,
    static_argnames=('model', 'how', 'slots', 'n_top'),
    donate_argnames=('state', 'text_BS', 'own'),
)
def _run(
    model: Model,
    how: Lookup | Heads | ByModel,
    params: Params,
    small: Params | None,
    state: State,
    text_BS: jax.Array,
    own: Cache | None,
    settings: Settings,
    *,
    slots: int,
    n_top: int | None,
) -> _Carry:
    """Draw until every row is done; all that was donated comes back, so that it stays in place."""
    state = replace(state, text_BS=text_BS)
    carry = _begun(state, own, pad_id=model.pad_id, slots=slots, n_top=n_top)
    return _loop(model, how, params, small, carry, settings, n_top=n_top)


def draw_some(
    model: Model,
    how: Lookup | Heads,
    params: Params,
    state: State,
    settings: Settings,
    n_steps: Int[Array, ''],
    may_draft: Bool[Array, ''],
    *,
    slots: int,
    n_top: int | None,
) -> tuple[State, Drawn, Counts]:
    """Run the model up to `n_steps` times for a batch that goes on: up to `how.n_draft` tokens more
    each time, `slots` in all. The cache has room for `how.n_draft` tokens behind the longest row.
    Where no row has a draft, or none `may_draft`, it is an ordinary step."""
    carry = _begun(state, None, pad_id=model.pad_id, slots=slots, n_top=n_top)
    done = _loop(
        *(model, how, params, None, carry, settings),
        n_top=n_top,
        n_steps=n_steps,
        may_draft=may_draft,
    )
    rows = done.rows
    state = State(
        *(done.cache, rows.token_B, rows.position_B, rows.done_B, rows.history, rows.text_BS),
        draft_BK=done.draft_BK,
    )
    return state, rows.drawn, rows.counts


def _begun(
    state: State, own: Cache | None, *, pad_id: int, slots: int, n_top: int | None
) -> _Carry:
    assert state.text_BS is not None
    zero_B = jnp.zeros_like(state.position_B)
    rows = Rows(
        *(state.token_B, state.position_B, state.done_B, state.history, state.text_BS),
        drawn=decode_lib.nothing(len(zero_B), slots, pad_id, n_top),
        counts=Counts(zero_B, zero_B, zero_B, zero_B),
    )
    return _Carry(state.cache, own, rows, state.draft_BK)


def _loop(
    model: Model,
    how: Lookup | Heads | ByModel,
    params: Params,
    small: Params | None,
    carry: _Carry,
    settings: Settings,
    *,
    n_top: int | None,
    n_steps: jax.Array | None = None,
    may_draft: jax.Array | None = None,
) -> _Carry:
    start_B = carry.rows.position_B

    def drafted(carry: _Carry) -> tuple[Drafted, Cache | None]:
        rows, own = carry.rows, carry.own
        if isinstance(how, Lookup):
            draft = on_rows(functools.partial(look_up, how), rows.text_BS, rows.position_B)
        elif isinstance(how, Heads):
            assert carry.draft_BK is not None
            n_B = jnp.where(carry.draft_BK[:, 0] >= 0, how.n_draft, 0)
            draft = Drafted(jnp.maximum(carry.draft_BK, 0), n_B)
        else:
            assert small is not None and own is not None
            draft, own = draft_by(how, small, own, rows.token_B, rows.position_B, settings)
        left_B = jnp.where(rows.done_B, 0, settings.last_B - rows.position_B)
        if may_draft is not None:
            left_B = jnp.where(may_draft, left_B, 0)
        return replace(draft, n_B=jnp.minimum(draft.n_B, left_B)), own

    def step(carry: _Carry, draft: Drafted, own: Cache | None) -> _Carry:
        rows = carry.rows
        token_BT = jnp.concatenate([rows.token_B[:, None], draft.token_BK], axis=1)
        x_JBTD, cache = decode_lib.of_heads(
            model, params, token_BT, cache=carry.cache, at_B=rows.position_B
        )
        assert cache is not None  # given a cache, a model returns one
        logits_BTV = decode_lib.head(model, params, x_JBTD[0])
        decide = functools.partial(verify, pad_id=model.pad_id, n_top=n_top)
        more = on_rows(decide, logits_BTV, draft, settings, start_B, rows)
        draft_BK = carry.draft_BK
        if isinstance(how, Heads):
            # The newest token was drawn from the place before it.
            last_B = more.position_B - rows.position_B - 1
            draft_BK = expected(how, model, params, x_JBTD, last_B)
        return _Carry(cache, own, more, draft_BK)

    def unfinished(carry: _Carry) -> jax.Array:
        goes_on = ~carry.rows.done_B.all()
        return goes_on if n_steps is None else goes_on & (carry.rows.counts.step_B.max() < n_steps)

    def some_draft(carry: _Carry) -> jax.Array:
        return (drafted(carry)[0].n_B > 0).any()

    def one_token(carry: _Carry) -> _Carry:
        no_draft_BK = jnp.zeros_like(carry.rows.text_BS[:, :0])
        return step(carry, Drafted(no_draft_BK, jnp.zeros_like(start_B)), carry.own)

    def some_tokens(carry: _Carry) -> _Carry:
        return step(carry, *drafted(carry))

    def as_drafted(carry: _Carry) -> _Carry:
        # Loops, for a condition whose branches hold the cache would copy it.
        carry = jax.lax.while_loop(
            lambda carry: unfinished(carry) & ~some_draft(carry), one_token, carry
        )
        return jax.lax.while_loop(
            lambda carry: unfinished(carry) & some_draft(carry), some_tokens, carry
        )

    body = some_tokens if isinstance(how, ByModel) else as_drafted
    return jax.lax.while_loop(unfinished, body, carry)

"""Beam search: the likeliest texts instead of drawn ones, in one loop on the device.

W beams of each prompt go on at a time; rows of the cache are R = B W, those of one prompt next to
each other. The rules are those of `generate(num_beams=...)` of transformers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.generate import decode as decode_lib
from llama_jax.generate.controls import Controls
from llama_jax.generate.decode import Model
from llama_jax.generate.finite import finite
from llama_jax.generate.prefill import check_sources, prefill, shape_of
from llama_jax.generate.programs import Programs, bucket, check_prompt
from llama_jax.model.cache import Cache, LayerCache, placed
from llama_jax.model.layers import Params

_ROWS = layout.rows()
Tree = TypeVar('Tree')


@dataclass(frozen=True)
class Hypothesis:
    """One text that was found."""

    tokens: list[int]
    """Without the end id."""
    score: float
    """Sum of the log-probabilities of all tokens, the end id included, divided by their number to
    the power of the length penalty."""
    finish_reason: Literal['stop', 'length']


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rules:
    """What may change without a compilation."""

    end_E: Int[Array, ' E']
    max_tokens: Int[Array, '']
    divisor_T: Float[Array, ' T']
    """Of the score of a text with 1, 2, ... tokens."""
    hope_T: Float[Array, ' T']
    """Of what the best running beam may still reach, after 1, 2, ... tokens."""
    first_wins: Bool[Array, '']
    """A prompt is done once W texts have ended."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Beams:
    """Running beams and ended texts, best first."""

    score_BW: Float[Array, 'B W']
    """Log-probability of each running beam; -inf: there is none."""
    token_BWT: Int[Array, 'B W T']
    ended_score_BW: Float[Array, 'B W']
    """Divided as it is reported; -inf: there is none."""
    ended_token_BWT: Int[Array, 'B W T']
    ended_length_BW: Int[Array, 'B W']
    open_B: Bool[Array, ' B']
    """A running beam may still become better than the worst text that has ended."""
    finite_B: Bool[Array, ' B']
    """All logits were numbers, as long as they counted."""

    def live(self, rules: _Rules) -> Bool[Array, ' B']:
        """Prompts whose texts may still change."""
        full_B = jnp.isfinite(self.ended_score_BW).all(axis=1)
        return self.open_B & self.finite_B & ~(full_B & rules.first_wins)


def beam_search(
    programs: Programs,
    prompts: Sequence[Sequence[int]],
    *,
    sources: Sequence[Sequence[int]] | None = None,
    beams: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal['never'] = False,
    n: int = 1,
    stop_ids: Sequence[int] = (),
    prefill_chunk: int = 512,
) -> list[list[Hypothesis]]:
    """For each prompt the `n` best texts that were found, best first; fewer where the vocabulary
    does not have as many.

    Args:
      sources: what an encoder reads for each prompt; an encoder-decoder needs it.
      beams: texts that are pursued at a time; 1 is greedy.
      length_penalty: scores are divided by the number of tokens to this power: above 0 favours long
        texts.
      early_stopping: when a prompt is done. True: once `beams` texts have ended. False: once the
        best running one, were it to end now, would not be among them. 'never': once it could not be
        among them however long it became.
      n: texts to return, at most `beams`.
      stop_ids: end a text besides the end ids of the model.

    Prompts may be of different lengths, and a prompt's texts do not depend on the others. Any mesh
    will do. The cache holds `beams` rows for each prompt, and a copy of one layer while beams
    change places. Raises UserError for what cannot be done, NotFiniteError where a prompt's logits
    are no numbers.
    """
    _check(programs, prompts, beams, max_tokens, length_penalty, early_stopping, n, stop_ids)
    shape = shape_of(
        programs,
        prompts=len(prompts),
        longest=max(map(len, prompts)),
        max_tokens=max_tokens,
        prefill_chunk=prefill_chunk,
        source=check_sources(programs, prompts, sources),
    )
    ends = [*programs.end_ids, *stop_ids]
    rules = _rules(ends, max_tokens, length_penalty, early_stopping)
    with jax.set_mesh(programs.mesh):
        x_BD, cache, length_B = prefill(
            programs, prompts, shape, sources, limits=[len(p) + max_tokens for p in prompts]
        )
        found: _Beams = jax.device_get(
            _search(
                *(programs.model, programs.params, cache, x_BD, length_B, rules),
                beams=beams,
                slots=bucket(max_tokens),
            )
        )
    for b in range(len(prompts)):
        if not found.finite_B[b]:
            raise programs.not_finite(f'prompt {b}: the model gives')
    return [
        [_hypothesis(found, b, w, ends) for w in range(n) if found.ended_score_BW[b, w] > -math.inf]
        for b in range(len(prompts))
    ]


@functools.partial(jax.jit, static_argnames=('model', 'beams', 'slots'))
def _search(
    model: Model,
    params: Params,
    cache: Cache,
    x_BD: jax.Array,
    length_B: jax.Array,
    rules: _Rules,
    *,
    beams: int,
    slots: int,
) -> _Beams:
    Carry = tuple[jax.Array, jax.Array, jax.Array, Cache, _Beams]

    def unfinished(carry: Carry) -> jax.Array:
        n, _, _, _, found = carry
        return (n < rules.max_tokens) & found.live(rules).any()

    def one_step(carry: Carry) -> Carry:
        n, token_R, position_R, cache, found = carry
        logits_RV, cache = decode_lib.step(model, params, token_R, position_R, cache)
        found, parent_BW, token_R = _advance(logits_RV, found, n, rules)
        return n + 1, token_R, position_R + 1, _follow(cache, parent_BW), found

    logits_BV = _whole(decode_lib.head(model, params, x_BD[:, None])[:, 0])
    logits_RV, position_R = (_repeat(x, beams, _ROWS) for x in (logits_BV, length_B))
    nothing = _nothing(length_B, beams, slots, model.pad_id)
    found, _, token_R = _advance(logits_RV, nothing, jnp.int32(0), rules)
    cache = _repeat(cache, beams, placed(cache))
    carry = (jnp.int32(1), token_R, position_R, cache, found)
    return jax.lax.while_loop(unfinished, one_step, carry)[-1]


def _nothing(length_B: jax.Array, beams: int, slots: int, pad_id: int) -> _Beams:
    """One running beam for each prompt, without a token."""

    def local(length_B: jax.Array) -> _Beams:
        B, no_text = len(length_B), -jnp.inf
        token_BWT = jnp.full((B, beams, slots), pad_id, jnp.int32)
        return _Beams(
            score_BW=jnp.full((B, beams), no_text).at[:, 0].set(0),
            token_BWT=token_BWT,
            ended_score_BW=jnp.full((B, beams), no_text),
            ended_token_BWT=token_BWT,
            ended_length_BW=jnp.zeros((B, beams), jnp.int32),
            open_B=length_B > 0,
            finite_B=jnp.full(B, True),
        )

    return jax.shard_map(local, in_specs=_ROWS, out_specs=_ROWS, check_vma=False)(length_B)


def _advance(
    logits_RV: jax.Array, found: _Beams, n: jax.Array, rules: _Rules
) -> tuple[_Beams, jax.Array, jax.Array]:
    """The beams after their token number `n`, counted from 0; which beam each one goes on from; and
    their newest tokens [R]. Each device searches for its own prompts."""
    return jax.shard_map(
        _advance_rows,
        in_specs=(_ROWS, _ROWS, P(), P()),
        out_specs=_ROWS,
        check_vma=False,  # constants do not vary over the mesh
    )(_whole(logits_RV), found, n, rules)


def _advance_rows(
    logits_RV: jax.Array, found: _Beams, n: jax.Array, rules: _Rules
) -> tuple[_Beams, jax.Array, jax.Array]:
    (B, W), V = found.score_BW.shape, logits_RV.shape[-1]
    finite_B = finite(logits_RV).reshape(B, W).all(axis=1)
    log_BWV = jax.nn.log_softmax(logits_RV).reshape(B, W, V) + found.score_BW[..., None]
    # Candidates C: so many that W of them go on, should all others end.
    n_candidates = min(W * (1 + len(rules.end_E)), W * V)
    score_BC, place_BC = jax.lax.top_k(log_BWV.reshape(B, W * V), n_candidates)
    parent_BC, token_BC = place_BC // V, place_BC % V
    token_BCT = _taken(found.token_BWT, parent_BC).at[:, :, n].set(token_BC)
    ends_BC = (token_BC[..., None] == rules.end_E).any(axis=-1) | (n + 1 == rules.max_tokens)

    running_BW, pick_BW = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, score_BC), W)
    parent_BW, token_BW = _taken(parent_BC, pick_BW), _taken(token_BC, pick_BW)

    # Only the best W may end: the others are there to go on.
    counts_BC = ends_BC & (jnp.arange(n_candidates) < W) & found.live(rules)[:, None]
    final_BC = jnp.where(counts_BC, score_BC / rules.divisor_T[n], -jnp.inf)
    every_BX = jnp.concatenate([found.ended_score_BW, final_BC], axis=1)
    ended_BW, kept_BW = jax.lax.top_k(every_BX, W)
    length_BC = jnp.broadcast_to(n + 1, ends_BC.shape)
    length_BX = jnp.concatenate([found.ended_length_BW, length_BC], axis=1)
    token_BXT = jnp.concatenate([found.ended_token_BWT, token_BCT], axis=1)

    hope_B, worst_B = running_BW[:, 0] / rules.hope_T[n], ended_BW[:, -1]
    found = _Beams(
        score_BW=running_BW,
        token_BWT=_taken(token_BCT, pick_BW),
        ended_score_BW=ended_BW,
        ended_token_BWT=_taken(token_BXT, kept_BW),
        ended_length_BW=_taken(length_BX, kept_BW),
        open_B=found.open_B & (hope_B > worst_B),
        finite_B=found.finite_B & (finite_B | ~found.live(rules)),
    )
    return found, parent_BW, token_BW.reshape(-1)


def _whole(logits_BV: jax.Array) -> jax.Array:
    """Each row's whole vocabulary on its device."""
    return jax.reshard(logits_BV, P(*_ROWS, None))


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Of each row of `x` [B, C, ...] the entries `index` [B, W]."""
    return jax.vmap(lambda x, index: x[index])(x, index)


def _follow(cache: Cache, parent_BW: jax.Array) -> Cache:
    """The cache with each beam's row replaced by that of the beam which it goes on from."""

    def local(layers: list[LayerCache], parent_BW: jax.Array) -> list[LayerCache]:
        B, W = parent_BW.shape
        row_R = (jnp.arange(B)[:, None] * W + parent_BW).reshape(-1)
        return jax.tree.map(lambda x: x[row_R], layers)

    spec = layout.act('BK')
    layers = jax.shard_map(local, in_specs=(spec, _ROWS), out_specs=spec, check_vma=False)(
        cache.layers, parent_BW
    )
    return replace(cache, layers=layers)  # all else is the same for all beams of a prompt


def _repeat(tree: Tree, times: int, spec: Any) -> Tree:
    """Every row `times` in a row."""

    def local(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)

    return jax.shard_map(local, in_specs=(spec,), out_specs=spec, check_vma=False)(tree)


def _check(
    programs: Programs,
    prompts: Sequence[Sequence[int]],
    beams: int,
    max_tokens: int,
    length_penalty: float,
    early_stopping: object,
    n: int,
    stop_ids: Sequence[int],
) -> None:
    if not len(prompts):
        raise UserError('no prompts: give at least one')
    Controls(max_tokens=max_tokens, stop_ids=tuple(stop_ids)).check(vocab=programs.config.ids)
    if beams < 1:
        raise UserError(f'beams {beams}: at least 1')
    if not 1 <= n <= beams:
        raise UserError(f'n {n} is not within 1 and the {beams} beams: give more beams')
    if not -6 <= length_penalty <= 6:
        raise UserError(f'length_penalty {length_penalty} is not within -6..6')
    if early_stopping not in (True, False, 'never'):
        raise UserError(f"early_stopping {early_stopping!r} is none of True, False and 'never'")
    for i, prompt in enumerate(prompts):
        check_prompt(prompt, f'prompt {i}', vocab=programs.config.ids)
        programs.check_length(len(prompt), max_tokens, f'prompt {i}')


def _rules(
    ends: Sequence[int],
    max_tokens: int,
    length_penalty: float,
    early_stopping: bool | Literal['never'],
) -> _Rules:
    """Arrays of numpy; powers are taken in float64."""
    length_T = np.arange(1, bucket(max_tokens) + 1, dtype=np.float64)
    divisor_T = length_T**length_penalty
    hope_T = divisor_T
    if early_stopping == 'never' and length_penalty > 0:
        hope_T = np.full_like(divisor_T, float(max_tokens) ** length_penalty)
    fields: dict[str, Any] = dict(
        end_E=np.array(ends, np.int32),
        max_tokens=np.int32(max_tokens),
        divisor_T=divisor_T.astype(np.float32),
        hope_T=hope_T.astype(np.float32),
        first_wins=np.bool_(early_stopping is True),
    )
    return _Rules(**fields)


def _hypothesis(found: _Beams, b: int, w: int, ends: Sequence[int]) -> Hypothesis:
    tokens = found.ended_token_BWT[b, w, : found.ended_length_BW[b, w]].tolist()
    ended = tokens[-1] in ends
    return Hypothesis(
        tokens[:-1] if ended else tokens,
        float(found.ended_score_BW[b, w]),
        'stop' if ended else 'length',
    )

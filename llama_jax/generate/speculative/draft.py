"""Drafted tokens: what followed before in the same row (prompt lookup), what heads of the model
expect, or what a small model draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.generate import decode as decode_lib
from llama_jax.generate.decode import Model
from llama_jax.generate.programs import SMALLEST, Programs
from llama_jax.generate.sampling import DRAFT, distribution, draw_from
from llama_jax.generate.settings import Settings, shaped
from llama_jax.model.cache import Cache
from llama_jax.model.layers import Params

MOST = SMALLEST - 1
"""Tokens that are drafted at a time: a ring keeps what the smallest piece of a prompt needs."""


@dataclass(frozen=True)
class Lookup:
    """Draft what followed where the row's last tokens stood before (prompt lookup, Saxena 2023).

    A repetition goes on: where the end is a repetition of itself, so is the draft.
    """

    n_gram: int = 3
    """Last tokens that are looked for; then fewer. The longest match wins, of these the latest."""
    n_draft: int = 8
    """Tokens that are drafted."""
    least: int = 1
    """A match of fewer tokens is none. Without one in any row, a step is an ordinary one."""

    def __post_init__(self) -> None:
        _check_n_draft(self.n_draft)
        if not 1 <= self.least <= self.n_gram <= MOST:
            raise UserError(
                f'lookup of {self.least} to {self.n_gram} tokens: least is 1 or more, and n_gram '
                f'from there to {MOST}'
            )


@dataclass(frozen=True)
class Draft:
    """Draft with a smaller model of the same vocabulary (Leviathan et al. 2023; Chen et al. 2023).

    It draws as the row does, under the same controls but for penalties.
    """

    programs: Programs
    """Of the small model, on the mesh of the large one."""
    n_draft: int = 4
    """Tokens that are drafted."""

    def __post_init__(self) -> None:
        _check_n_draft(self.n_draft)


@dataclass(frozen=True)
class Heads:
    """Draft with the heads that the model was trained with for tokens further ahead (Stern et al.
    2018; Gloeckle et al. 2024, section 2): each gives its likeliest token, in the same run of the
    model that verifies the drafts before."""

    n_draft: int
    """Heads that draft, a token each: those of the nearest tokens."""

    def __post_init__(self) -> None:
        _check_n_draft(self.n_draft)


@dataclass(frozen=True)
class ByModel:
    """A Draft, as far as it is fixed when a program is compiled."""

    model: Model
    n_draft: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafted:
    """Tokens that may follow the newest of each row."""

    token_BK: Int[Array, 'B K']
    n_B: Int[Array, ' B']
    """The first so many of them are meant."""
    probability_BKV: Float[Array, 'B K V'] | None = None
    """From which they were drawn; None: there was no chance in them."""


def look_up(how: Lookup, text_BS: jax.Array, position_B: jax.Array) -> Drafted:
    """What followed the longest match of the row's end."""
    B, S = text_BS.shape
    place_S, n_B1 = jnp.arange(S), position_B[:, None] + 1
    same_BS, length_BS = jnp.ones((B, S), bool), jnp.zeros((B, S), jnp.int32)
    for i in range(how.n_gram):  # tokens before the last one
        last_B1 = jnp.take_along_axis(text_BS, jnp.maximum(n_B1 - 1 - i, 0), axis=1)
        same_BS &= (jnp.roll(text_BS, i, axis=1) == last_B1) & (place_S >= i)
        length_BS += same_BS
    length_BS = jnp.where(place_S < n_B1 - 1, length_BS, 0)
    best_B1 = jnp.argmax(length_BS * S + place_S, axis=1, keepdims=True)
    longest_B = jnp.take_along_axis(length_BS, best_B1, axis=1)[:, 0]
    start_B1 = best_B1 + 1
    period_B1 = jnp.maximum(n_B1 - start_B1, 1)
    place_BK = start_B1 + jnp.arange(how.n_draft) % period_B1
    token_BK = jnp.take_along_axis(text_BS, place_BK, axis=1)
    return Drafted(token_BK, jnp.where(longest_B >= how.least, how.n_draft, 0))


def expected(
    how: Heads, model: Model, params: Params, x_JBTD: jax.Array, last_B: jax.Array
) -> Int[Array, 'B K']:
    """The likeliest token of each head behind the newest token of each row, which was drawn from
    place `last_B` of these features. The controls of the row have no say in it."""
    T = x_JBTD.shape[2]
    here_BT1 = (jnp.arange(T) == last_B[:, None])[..., None]
    x_KBD = jnp.where(here_BT1, x_JBTD[1 : 1 + how.n_draft], 0).sum(axis=2)
    logits_BKV = decode_lib.head(model, params, jnp.einsum('KBD->BKD', x_KBD))
    return on_rows(lambda logits_BKV: jnp.argmax(logits_BKV, axis=-1), logits_BKV)


def draft_by(
    how: ByModel,
    params: Params,
    cache: Cache,
    token_B: jax.Array,
    position_B: jax.Array,
    settings: Settings,
) -> tuple[Drafted, Cache]:
    """Draws of the small model. It reads its last draft too, which may come to stand in the text:
    one step more than it has drafts."""

    def one(
        carry: tuple[jax.Array, jax.Array, Cache], _: None
    ) -> tuple[tuple[jax.Array, jax.Array, Cache], tuple[jax.Array, jax.Array]]:
        token_B, position_B, cache = carry
        logits_BV, cache = decode_lib.step(how.model, params, token_B, position_B, cache)
        position_B = position_B + 1
        token_B, probability_BV = on_rows(_drawn_draft, logits_BV, settings, position_B)
        return (token_B, position_B, cache), (token_B, probability_BV)

    (_, _, cache), (token_TB, probability_TBV) = jax.lax.scan(
        one, (token_B, position_B, cache), None, length=how.n_draft + 1
    )
    return Drafted(
        jnp.einsum('TB->BT', token_TB[:-1]),
        jnp.full_like(position_B, how.n_draft),
        jnp.einsum('TBV->BTV', probability_TBV[:-1]),
    ), cache


def _drawn_draft(
    logits_BV: jax.Array, settings: Settings, position_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    probability_BV = distribution(shaped(logits_BV, settings, None, position_B), settings)
    return draw_from(probability_BV, settings, position_B, purpose=DRAFT), probability_BV


def on_rows(f: Callable[..., Any], *arguments: Any) -> Any:
    """`f` on each device's own rows, all of whose arrays it has."""
    rows = layout.rows()
    whole = [
        jax.reshard(x, P(*rows, *[None] * (x.ndim - 1))) if isinstance(x, jax.Array) else x
        for x in arguments
    ]
    # Carries of loops start as constants, which do not vary over the mesh.
    return jax.shard_map(f, in_specs=rows, out_specs=rows, check_vma=False)(*whole)


def _check_n_draft(n_draft: int) -> None:
    if not 1 <= n_draft <= MOST:
        raise UserError(f'n_draft {n_draft}: draft 1 to {MOST} tokens at a time')

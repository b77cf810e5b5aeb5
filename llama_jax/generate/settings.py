"""Controls of all rows as arrays: nothing recompiles when they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from llama_jax.generate.controls import MOST_STOP_IDS, Controls

NO_ID = -1
END_IDS = 8
"""End ids that a model may have."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """How each row draws and when it ends; the meaning of each is that of Controls."""

    temperature_B: Float[Array, ' B']
    top_k_B: Int[Array, ' B']
    top_p_B: Float[Array, ' B']
    min_p_B: Float[Array, ' B']
    typical_p_B: Float[Array, ' B']
    repetition_B: Float[Array, ' B']
    presence_B: Float[Array, ' B']
    frequency_B: Float[Array, ' B']
    seed_B: UInt32[Array, ' B']
    end_BE: Int[Array, 'B E']
    """Ids that end the row, filled up with NO_ID."""
    earliest_B: Int[Array, ' B']
    """First place at which an end id may stand."""
    last_B: Int[Array, ' B']
    """Place of the last token that the row may draw."""
    reported_B: Bool[Array, ' B']
    """Log-probabilities are wanted."""
    bias_BV: Float[Array, 'B V'] | None
    """Added to the logits, -inf for tokens that may not come; None: nothing is, in any row."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What penalties look at."""

    prompt_BV: Bool[Array, 'B V']
    """Tokens of the prompt."""
    count_BV: Int[Array, 'B V']
    """How often each token was drawn."""


def rows_of(
    controls: Sequence[Controls],
    *,
    lengths: Sequence[int],
    rows: int,
    end_ids: Sequence[int],
    vocab: int,
    bias: bool,
) -> Any:
    """Settings, arrays of numpy, for `rows` rows. The first of them have these controls and prompts
    of these lengths; the others are greedy and have no token to draw."""

    def filled(get: Callable[[Controls], float], dtype: type, fill: float = 0) -> np.ndarray:
        values: np.ndarray = np.full(rows, fill, dtype)
        values[: len(controls)] = [get(one) for one in controls]
        return values

    ends = np.full((rows, END_IDS + MOST_STOP_IDS), NO_ID, np.int32)
    for i, one in enumerate(controls):
        ids = [*(() if one.ignore_end else end_ids), *one.stop_ids]
        ends[i, : len(ids)] = ids
    start = np.zeros(rows, np.int32)
    start[: len(lengths)] = lengths
    fields: dict[str, Any] = dict(
        temperature_B=filled(lambda c: c.temperature, np.float32),
        top_k_B=filled(lambda c: c.top_k, np.int32),
        top_p_B=filled(lambda c: c.top_p, np.float32, 1),
        min_p_B=filled(lambda c: c.min_p, np.float32),
        typical_p_B=filled(lambda c: c.typical_p, np.float32, 1),
        repetition_B=filled(lambda c: c.repetition_penalty, np.float32, 1),
        presence_B=filled(lambda c: c.presence_penalty, np.float32),
        frequency_B=filled(lambda c: c.frequency_penalty, np.float32),
        seed_B=filled(lambda c: c.seed or 0, np.uint32),
        end_BE=ends,
        earliest_B=start + filled(lambda c: c.min_tokens, np.int32),
        last_B=start + filled(lambda c: min(c.max_tokens, 2**30), np.int32) - 1,
        reported_B=filled(lambda c: c.logprobs is not None, bool),
        bias_BV=_bias(controls, rows, vocab) if bias else None,
    )
    return Settings(**fields)


def history_of(prompts: Sequence[Sequence[int]], *, rows: int, vocab: int) -> Any:
    """History, arrays of numpy, for `rows` rows, of which the first have these prompts."""
    prompt_BV = np.zeros((rows, vocab), bool)
    for i, prompt in enumerate(prompts):
        prompt_BV[i, list(prompt)] = True
    return History(prompt_BV, np.zeros((rows, vocab), np.int32))  # type: ignore[arg-type]


def _bias(controls: Sequence[Controls], rows: int, vocab: int) -> np.ndarray:
    bias_BV = np.zeros((rows, vocab), np.float32)
    for i, one in enumerate(controls):
        for token, value in one.logit_bias.items():
            bias_BV[i, token] = value
    return bias_BV


def has_penalties(one: Controls) -> bool:
    """Whether the history of the row changes what it draws."""
    neutral = (one.repetition_penalty, one.presence_penalty, one.frequency_penalty)
    return neutral != (1.0, 0.0, 0.0)


def is_end(settings: Settings, token_B: Int[Array, ' B']) -> Bool[Array, ' B']:
    """Whether each token ends its row."""
    return (settings.end_BE == token_B[:, None]).any(axis=-1)


def shaped(
    logits_BV: Float[Array, 'B V'],
    settings: Settings,
    history: History | None,
    position_B: Int[Array, ' B'],
) -> Float[Array, 'B V']:
    """Logits from which the tokens at `position_B` are drawn: after penalties, bias, and with end
    ids out of reach where it is too early for them."""
    if history is not None:
        logits_BV = _penalised(logits_BV, settings, history)
    if settings.bias_BV is not None:
        logits_BV = logits_BV + settings.bias_BV

    def without_ends() -> jax.Array:
        id_V = jnp.arange(logits_BV.shape[-1])
        end_BV = (settings.end_BE[:, :, None] == id_V).any(axis=1)
        early_B1 = (position_B < settings.earliest_B)[:, None]
        return jnp.where(end_BV & early_B1, -jnp.inf, logits_BV)

    early = (position_B < settings.earliest_B).any()
    return jax.lax.cond(early, without_ends, lambda: logits_BV)


def only(settings: Settings, allowed_BC: UInt8[Array, 'B C']) -> Settings:
    """The settings with no tokens in reach but those whose bits are set, eight to a byte, the
    lowest first."""
    assert settings.bias_BV is not None
    B, V = settings.bias_BV.shape
    bit_BCX = (allowed_BC[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    bias_BV = jnp.where(bit_BCX.reshape(B, -1)[:, :V] == 1, settings.bias_BV, -jnp.inf)
    return replace(settings, bias_BV=bias_BV)


def _penalised(logits_BV: jax.Array, settings: Settings, history: History) -> jax.Array:
    drawn_BV = history.count_BV > 0
    repetition_B1 = settings.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(history.prompt_BV | drawn_BV, repeated_BV, logits_BV)
    logits_BV = logits_BV - settings.frequency_B[:, None] * history.count_BV
    return logits_BV - settings.presence_B[:, None] * drawn_BV

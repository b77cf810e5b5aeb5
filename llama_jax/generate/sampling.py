"""Drawing the next token: greedy, temperature, top-k, top-p, min-p, typical-p, each by row."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from llama_jax.generate.settings import Settings

DRAFT, TRIAL, INSTEAD, ORDER = 1, 2, 3, 4
"""What else a row draws at a place when tokens are drafted: a draft, whether it holds, and what
replaces one that does not; and where masks are filled in, which of them come first."""


def sample(
    logits_BV: Float[Array, 'B V'], settings: Settings, position_B: Int[Array, ' B']
) -> Int[Array, ' B']:
    """The next token of each row, int32.

    A row's draw depends on its own logits, seed and position (of the token to be drawn, counted
    from the row's first token), and on nothing else in the batch. Float32; every row whole on its
    device.
    """
    # Ties of the maximum would leave several tokens to top-k 1: it takes the first, as greedy does.
    greedy_B = ~is_drawn(settings)
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        scaled_BV = scale(logits_BV, settings.temperature_B)
        kept_BV = keep(logits_BV, scaled_BV, settings)
        kept_BV = jnp.where(kept_BV, scaled_BV, -jnp.inf)
        return jax.vmap(_categorical)(kept_BV, settings.seed_B, position_B)

    drawn_B = jax.lax.cond(greedy_B.all(), lambda: best_B, draw)
    return jnp.where(greedy_B, best_B, drawn_B)


def distribution(logits_BV: Float[Array, 'B V'], settings: Settings) -> Float[Array, 'B V']:
    """Probabilities from which `sample` draws; 1 for the token of a greedy row."""
    greedy_B = ~is_drawn(settings)
    best_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1])

    def drawn() -> jax.Array:
        scaled_BV = scale(logits_BV, settings.temperature_B)
        kept_BV = keep(logits_BV, scaled_BV, settings)
        return jax.nn.softmax(jnp.where(kept_BV, scaled_BV, -jnp.inf), axis=-1)

    drawn_BV = jax.lax.cond(greedy_B.all(), lambda: best_BV, drawn)
    return jnp.where(greedy_B[:, None], best_BV, drawn_BV)


def draw_from(
    probability_BV: Float[Array, 'B V'],
    settings: Settings,
    position_B: Int[Array, ' B'],
    *,
    purpose: int,
) -> Int[Array, ' B']:
    """A token of each row; the randomness is that of its seed, its position and the `purpose`, and
    no one else's. Probabilities need not sum to 1."""

    def one(probability_V: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
        key = _key(seed, position, purpose)
        return jax.random.categorical(key, jnp.log(probability_V)).astype(jnp.int32)

    return jax.vmap(one)(probability_BV, settings.seed_B, position_B)


def uniform(
    settings: Settings, position_B: Int[Array, ' B'], *, purpose: int
) -> Float[Array, ' B']:
    """A number in [0, 1) of each row; see `draw_from`."""
    return jax.vmap(lambda seed, at: jax.random.uniform(_key(seed, at, purpose)))(
        settings.seed_B, position_B
    )


def _key(seed: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)


def is_drawn(settings: Settings) -> Bool[Array, ' B']:
    """Rows that need randomness. Temperatures that float32 cannot divide by count as 0."""
    smallest = jnp.finfo(jnp.float32).tiny
    return (settings.temperature_B >= smallest) & (settings.top_k_B != 1)


def scale(logits_BV: Float[Array, 'B V'], temperature_B: Float[Array, ' B']) -> Float[Array, 'B V']:
    """Logits under a temperature, shifted so that each row's largest is 0: no overflow."""
    below_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    temperature_B = jnp.maximum(temperature_B, jnp.finfo(jnp.float32).tiny)
    return below_BV / temperature_B[:, None]


def keep(
    logits_BV: Float[Array, 'B V'], scaled_BV: Float[Array, 'B V'], settings: Settings
) -> Bool[Array, 'B V']:
    """Tokens that top-k, top-p, min-p and typical-p leave, in this order, each of what the one
    before it left; all that tie with the last one kept are kept.

    Each is a threshold, found bit by bit: no sort over the vocabulary, which a TPU is slow at.
    Skipped when no row asks for it.
    """
    order_BV, weight_BV = ordered(logits_BV), jnp.exp(scaled_BV)  # the largest weight is 1
    V = logits_BV.shape[-1]
    kept_BV = jnp.isfinite(logits_BV)

    def by_k(kept_BV: jax.Array) -> jax.Array:
        k_B = jnp.where(settings.top_k_B == 0, V, jnp.clip(settings.top_k_B, 1, V))

        def enough(threshold_B: jax.Array) -> jax.Array:
            return jnp.sum(order_BV >= threshold_B[:, None], axis=-1) >= k_B

        return kept_BV & (order_BV >= _largest(enough, len(order_BV))[:, None])

    def by_mass(kept_BV: jax.Array, order_BV: jax.Array, share_B: jax.Array) -> jax.Array:
        """The first in an order that together have this share of the weight."""
        mass_BV = jnp.where(kept_BV, weight_BV, 0)
        needed_B = share_B * mass_BV.sum(axis=-1)

        def enough(threshold_B: jax.Array) -> jax.Array:
            above_BV = order_BV >= threshold_B[:, None]
            return jnp.sum(jnp.where(above_BV, mass_BV, 0), axis=-1) >= needed_B

        above_BV = order_BV >= _largest(enough, len(order_BV))[:, None]
        return kept_BV & (above_BV | (share_B >= 1)[:, None])

    def by_p(kept_BV: jax.Array) -> jax.Array:
        return by_mass(kept_BV, order_BV, settings.top_p_B)

    def by_min_p(kept_BV: jax.Array) -> jax.Array:
        return kept_BV & (weight_BV >= settings.min_p_B[:, None])

    def by_typical_p(kept_BV: jax.Array) -> jax.Array:
        log_BV = jax.nn.log_softmax(jnp.where(kept_BV, scaled_BV, -jnp.inf), axis=-1)
        information_BV = jnp.where(kept_BV, -log_BV, 0)
        entropy_B1 = jnp.sum(jnp.exp(log_BV) * information_BV, axis=-1, keepdims=True)
        nearness_BV = ordered(-jnp.abs(information_BV - entropy_B1))
        return by_mass(kept_BV, nearness_BV, settings.typical_p_B)

    for asked_B, narrow in (
        (settings.top_k_B > 0, by_k),
        (settings.top_p_B < 1, by_p),
        (settings.min_p_B > 0, by_min_p),
        (settings.typical_p_B < 1, by_typical_p),
    ):
        kept_BV = jax.lax.cond(asked_B.any(), narrow, lambda kept_BV: kept_BV, kept_BV)
    return kept_BV


def ordered(x: Float[Array, ' ...']) -> UInt32[Array, ' ...']:
    """Unsigned integers in the order of the float32 `x`; equal numbers (0 and -0) stay equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest(enough: Callable[[jax.Array], jax.Array], n_rows: int) -> UInt32[Array, ' B']:
    """Largest threshold of each row for which `enough`, true at 0 and monotone, holds."""

    def set_bit(i, threshold_B):
        higher_B = threshold_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(higher_B), higher_B, threshold_B)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(n_rows, jnp.uint32))


def _categorical(
    logits_V: Float[Array, ' V'], seed: UInt32[Array, ''], position: Int[Array, '']
) -> Int[Array, '']:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)

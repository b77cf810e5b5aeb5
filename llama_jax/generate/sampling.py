"""Drawing the next token: greedy, temperature, top-k, top-p, each by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How each row draws. Arrays, so that nothing recompiles when they change."""

    temperature_B: Float[Array, ' B']
    """0 (greedy) or more, float32."""
    top_k_B: Int[Array, ' B']
    """Only the k likeliest tokens, and all that tie with the last of them; 0: off."""
    top_p_B: Float[Array, ' B']
    """Only the likeliest tokens whose probabilities, after temperature and top-k, together reach p
    (nucleus sampling; Holtzman et al. 2020), and all that tie with the last of them; 1: off."""
    seed_B: UInt32[Array, ' B']


def sample(
    logits_BV: Float[Array, 'B V'], sampling: Sampling, position_B: Int[Array, ' B']
) -> Int[Array, ' B']:
    """The next token of each row, int32.

    A row's draw depends on its own logits, seed and position (of the token to be drawn, counted
    from the row's first token), and on nothing else in the batch. Float32; every row whole on its
    device.
    """
    # Ties of the maximum would leave several tokens to top-k 1: it takes the first, as greedy does.
    greedy_B = ~is_drawn(sampling)
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        scaled_BV = scale(logits_BV, sampling.temperature_B)
        kept_BV = keep(logits_BV, scaled_BV, sampling)
        kept_BV = jnp.where(kept_BV, scaled_BV, -jnp.inf)
        return jax.vmap(_categorical)(kept_BV, sampling.seed_B, position_B)

    drawn_B = jax.lax.cond(greedy_B.all(), lambda: best_B, draw)
    return jnp.where(greedy_B, best_B, drawn_B)


def is_drawn(sampling: Sampling) -> Bool[Array, ' B']:
    """Rows that need randomness. Temperatures that float32 cannot divide by count as 0."""
    smallest = jnp.finfo(jnp.float32).tiny
    return (sampling.temperature_B >= smallest) & (sampling.top_k_B != 1)


def scale(logits_BV: Float[Array, 'B V'], temperature_B: Float[Array, ' B']) -> Float[Array, 'B V']:
    """Logits under a temperature, shifted so that each row's largest is 0: no overflow."""
    below_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    temperature_B = jnp.maximum(temperature_B, jnp.finfo(jnp.float32).tiny)
    return below_BV / temperature_B[:, None]


def keep(
    logits_BV: Float[Array, 'B V'], scaled_BV: Float[Array, 'B V'], sampling: Sampling
) -> Bool[Array, 'B V']:
    """Tokens that top-k and top-p leave.

    Each is a threshold on the logits, found bit by bit: no sort over the vocabulary, which a TPU
    is slow at. Skipped when no row asks for it.
    """
    order_BV = ordered(logits_BV)
    V = logits_BV.shape[-1]
    top_k_B, top_p_B = sampling.top_k_B, sampling.top_p_B

    def by_k() -> jax.Array:
        k_B = jnp.clip(top_k_B, 1, V)

        def enough(threshold_B):
            return jnp.sum(order_BV >= threshold_B[:, None], axis=-1) >= k_B

        return (order_BV >= _largest(enough, len(order_BV))[:, None]) | (top_k_B == 0)[:, None]

    kept_BV = jax.lax.cond((top_k_B > 0).any(), by_k, lambda: jnp.ones(order_BV.shape, bool))

    def by_p() -> jax.Array:
        mass_BV = jnp.where(kept_BV, jnp.exp(scaled_BV), 0)  # up to a factor: the largest is 1
        needed_B = top_p_B * mass_BV.sum(axis=-1)

        def enough(threshold_B):
            above_BV = order_BV >= threshold_B[:, None]
            return jnp.sum(jnp.where(above_BV, mass_BV, 0), axis=-1) >= needed_B

        above_BV = order_BV >= _largest(enough, len(order_BV))[:, None]
        return kept_BV & (above_BV | (top_p_B >= 1)[:, None])

    return jax.lax.cond((top_p_B < 1).any(), by_p, lambda: kept_BV)


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

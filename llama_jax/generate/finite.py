"""Logits that are no numbers: a row that has them draws no token, and its request ends in an error.

The device says so in the token itself, so that a step transfers nothing more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llama_jax import trees
from llama_jax.errors import UserError
from llama_jax.precision import Precision

NOT_FINITE = -2
"""Stands where a token would, and is the last of its row."""


class NotFiniteError(UserError):
    """A model computes NaN or infinity where numbers should be."""


def finite(logits: Float[Array, '*B V']) -> Bool[Array, '*B']:
    """Whether something can be drawn from each row of a model's logits: none is NaN or +infinity,
    and some are above -infinity, which is that of padded ids. A maximum tells all three."""
    return jnp.isfinite(logits.max(axis=-1))


def error(what: str, params: object, precision: Precision | None = None) -> NotFiniteError:
    """For `what` a model made of these parameters, computing in `precision`, the reason and the
    remedy. Reads all of them, where they lie."""
    bad = [name for name, leaf in trees.named(params) if not _all_finite(leaf)]
    if bad:
        more = f' and {len(bad) - 3} more' if len(bad) > 3 else ''
        reason = (
            f'its weights hold NaN or infinity ({", ".join(bad[:3])}{more}): copy them again from '
            'where they came, or take an earlier checkpoint'
        )
    elif precision == 'float32':
        reason = 'its weights are finite, and overflow in float32: take other weights'
    else:
        where = f' in {precision}' if precision else ''
        reason = f'its weights are finite, and overflow{where}: set --compute.precision float32'
    return NotFiniteError(f'{what} NaN or infinity: {reason}')


def _all_finite(leaf: jax.Array) -> bool:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return True
    return all(bool(jnp.isfinite(shard.data).all()) for shard in leaf.addressable_shards)

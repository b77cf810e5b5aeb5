"""Low-rank adapters (Hu et al. 2021): a weight W + scale * A B, whose sum is never made.

A takes the first letters of W, B takes the others, and R, the rank, joins them: q_DNH has the
factors a_DR and b_RNH. `Adapted` is a kind of weight beside arrays and `Quantized`; products with
it are those of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.model import quantized
from llama_jax.model.matmul import matmul
from llama_jax.model.quantized import Quantized

RANK = 'R'


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A weight, and what is added to it."""

    base: jax.Array | Quantized
    a: Float[Array, '... R']
    b: Float[Array, 'R ...']
    key: jax.Array | None = None
    """Of the dropout of what A, or B where it comes first, reads; None: there is none. Stacked
    layers have one each."""
    scale: float = field(default=1.0, metadata={'static': True})
    dropout: float = field(default=0.0, metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return self.base.ndim

    def letters(self, of_weight: str) -> tuple[str, str]:
        """Those of A and of B, for a weight of one layer."""
        n = self.a.ndim - 1
        return of_weight[:n] + RANK, RANK + of_weight[n:]


Weight = jax.Array | Quantized | Adapted


def product(expression: str, a: Weight, b: Weight, *, dtype: Any) -> jax.Array:
    """`quantized.product`, where one of the two may be adapted as well."""
    if not isinstance(a, Adapted) and not isinstance(b, Adapted):
        return quantized.product(expression, a, b, dtype=dtype)
    w, x = (a, b) if isinstance(a, Adapted) else (b, a)
    assert isinstance(w, Adapted) and isinstance(x, jax.Array)
    factors = (w.base, x) if w is a else (x, w.base)
    y = quantized.product(expression, *factors, dtype=dtype)
    left, right = expression.split('->')[0].split(',')
    letters, of_x = (left, right) if w is a else (right, left)
    return y + delta(w, letters, x, of_x, expression.split('->')[1], first=w is a, dtype=dtype)


def delta(
    w: Adapted, letters: str, x: jax.Array, of_x: str, out: str, *, first: bool, dtype: Any
) -> jax.Array:
    """The product of `x` with scale * A B: with one factor, then with the other. `first`: the
    weight is the left one of the two."""
    factors = dict(zip(w.letters(letters), (w.a, w.b), strict=True))
    summed = [c for c in letters if c in of_x and c not in out]
    inner = next(name for name in factors if summed[0] in name)
    (outer,) = factors.keys() - {inner}
    if w.key is not None:
        x = _dropped(x, of_x, w.dropout, w.key)
    low = of_x.replace(summed[0], RANK)
    low = ''.join(c for c in low if c not in summed)

    def times(factor: str, x: jax.Array, of_x: str, out: str, dtype: Any) -> jax.Array:
        pair = ((factor, factors[factor]), (of_x, x))
        (left, one), (right, other) = pair if first else pair[::-1]
        return quantized.product(f'{left},{right}->{out}', one, other, dtype=dtype)

    # The scale goes to the few numbers between the factors.
    low_rank = times(inner, x, of_x, low, x.dtype) * jnp.asarray(w.scale, x.dtype)
    if not first and low == f'BT{RANK}' and low_rank.dtype == factors[outer].dtype == dtype:
        return matmul(low_rank, factors[outer], outer)
    return times(outer, low_rank, low, out, dtype)


def _dropped(x: jax.Array, letters: str, rate: float, key: jax.Array) -> jax.Array:
    uniform = jax.random.uniform(key, x.shape, out_sharding=layout.act(letters))
    return jnp.where(uniform >= rate, x / (1 - rate), jnp.zeros_like(x))


def dense(w: Weight, letters: str, dtype: Any) -> jax.Array:
    """The array that this stands for, of these letters: with adapters, the merged one. Summed in
    float32."""
    if not isinstance(w, Adapted):
        return quantized.dense(w, dtype)
    a, b = w.letters(letters)
    added = jnp.einsum(
        f'{a},{b}->{letters}',
        w.a.astype(jnp.float32),
        w.b.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (quantized.dense(w.base, jnp.float32) + w.scale * added).astype(dtype)


def has_adapters(model: Any) -> bool:
    """Whether some weight of a model, or of parameters, is adapted."""
    return any(isinstance(w, Adapted) for w in jax.tree.leaves(model, is_leaf=_is_adapted))


def adapters_off(model: Any) -> Any:
    """The same model, or parameters, without its adapters: what they were put upon. No array is
    copied, and it may be called within an objective's loss, for the reference of a preference.

    Raises UserError where there are none: the model would be its own reference.
    """
    if not has_adapters(model):
        raise UserError('this model has no adapters to turn off: set tune to LoRA')
    return jax.tree.map(lambda w: w.base if _is_adapted(w) else w, model, is_leaf=_is_adapted)


def _is_adapted(w: Any) -> bool:
    return isinstance(w, Adapted)

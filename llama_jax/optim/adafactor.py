"""Adafactor (Shazeer & Stern 2018): the second moment of a matrix by its rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llama_jax.errors import UserError
from llama_jax.layout import letters_of
from llama_jax.model.tune import INPUTS
from llama_jax.optim.base import Limit, OptimizerConfig, check_stored, is_matrix, share, stored
from llama_jax.trees import map_named

_EPS = 1e-30
"""Added to squared gradients."""


@dataclass(frozen=True)
class Adafactor(OptimizerConfig):
    """Adafactor without relative steps and sizes, so that the learning rate of AdamW fits (as Zhai
    et al. 2022 use it, section 3.4). Without momentum its state is a row and a column of each
    matrix.

    A matrix is that of a layer, of all heads together, as the product uses it.
    """

    momentum: Literal['none', 'float32', 'bfloat16'] = 'none'
    """How a momentum of the directions is stored, where one is kept."""
    beta1: float = 0.9
    """Decay of the momentum."""
    decay: float = 0.8
    """After t steps the second moments decay by 1 - t^-decay (section 7.2)."""
    clip_rms: float = 1.0
    """Directions of a matrix are scaled down to this root mean square (section 6)."""

    def directions(self) -> optax.GradientTransformation:
        scaled = _factored(self.decay, self.clip_rms)
        if self.momentum == 'none':
            return scaled
        ema = optax.ema(self.beta1, debias=False)
        return optax.chain(scaled, stored(ema, self.momentum))

    def limits(self) -> tuple[Limit, ...]:
        return (
            share('beta1', self.beta1),
            Limit('decay', self.decay, 0 < self.decay <= 1, 'in (0, 1]'),
            Limit('clip-rms', self.clip_rms, self.clip_rms > 0, 'positive'),
        )

    def check(self) -> None:
        super().check()
        check_stored(self.momentum, 'momentum', beta1=self.beta1)
        if self.beta1 != Adafactor.beta1 and self.momentum == 'none':
            raise UserError(
                f'--optimizer.beta1 {self.beta1} has no effect without a momentum: set '
                '--optimizer.momentum float32, or leave it out'
            )


class FactoredState(NamedTuple):
    step: jax.Array
    second: Any
    """Of each matrix `rows` and `columns`, with 1 in place of the dimensions averaged over;
    of all else the moment itself."""


def _factored(decay: float, clip: float) -> optax.GradientTransformation:
    def init(params: Any) -> FactoredState:
        return FactoredState(jnp.zeros((), jnp.int32), map_named(_zeros, params))

    def update(grads: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        count = optax.safe_increment(state.step)
        kept = 1.0 - jnp.float32(count) ** -decay

        def moved(path: str, g: jax.Array, second: Any) -> Any:
            square = g**2 + _EPS
            fresh: Any = square
            if isinstance(second, dict):
                inputs, outputs = _axes(path, g)
                fresh = {
                    'rows': square.mean(outputs, keepdims=True),
                    'columns': square.mean(inputs, keepdims=True),
                }
            return jax.tree.map(lambda v, new: kept * v + (1 - kept) * new, second, fresh)

        second = map_named(moved, grads, state.second)

        def direction(path: str, g: jax.Array, second: Any) -> jax.Array:
            inputs, outputs = _axes(path, g)
            if isinstance(second, dict):
                # Of rows first: the product of two small squares would be nothing in float32.
                rows = second['rows'] / second['rows'].mean(inputs, keepdims=True)
                u = g * jax.lax.rsqrt(rows) * jax.lax.rsqrt(second['columns'])
            else:
                u = g * jax.lax.rsqrt(second)
            rms = jnp.sqrt((u**2).mean((*inputs, *outputs), keepdims=True))
            return u / jnp.maximum(1.0, rms / clip)

        return map_named(direction, grads, second), FactoredState(count, second)

    return optax.GradientTransformation(init, update)


def _axes(path: str, x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of what a parameter reads, and of what it gives: those of layers are neither."""
    letters = letters_of(path, x.ndim)
    stacked = letters.startswith('L')
    name = path.rsplit('.', 1)[-1]
    own = letters[stacked:]
    # A of LoRA reads what its matrix does; a scalar reads nothing.
    inputs = INPUTS.get(name, own[:-1] if name == f'a_{own}' else own[:1])
    begin = stacked + len(inputs)
    return tuple(range(stacked, begin)), tuple(range(begin, x.ndim))


def _zeros(path: str, x: Any) -> Any:
    if not is_matrix(path, x):
        return jnp.zeros(x.shape, jnp.float32)
    inputs, outputs = _axes(path, x)

    def without(axes: tuple[int, ...]) -> jax.Array:
        return jnp.zeros([1 if i in axes else n for i, n in enumerate(x.shape)], jnp.float32)

    return {'rows': without(outputs), 'columns': without(inputs)}

"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): directions of which all singular
values are about 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import optax
import optax.contrib

from llama_jax import layout
from llama_jax.model.tune import INPUTS
from llama_jax.optim.adamw import adam, adam_limits
from llama_jax.optim.base import Limit, Moments, OptimizerConfig, check_stored, share, stored
from llama_jax.trees import map_named

RMS = 0.2
"""Root mean square of a direction's entries, about that of AdamW, so that its learning rate and
weight decay fit (Liu et al. 2025, 'Muon is scalable for LLM training', section 2.2)."""


@dataclass(frozen=True)
class Muon(OptimizerConfig):
    """Muon on the matrices of attention and feed-forward layers, AdamW on all else: embeddings,
    head, norms and biases. What an objective adds goes by its names: a further layer is Muon's.

    A matrix is that of a layer, of all heads together, as the product uses it. Muon keeps one
    moment where AdamW keeps two. Learning rate and weight decay are those of AdamW.
    """

    beta: float = 0.95
    """Decay of Muon's momentum, in Nesterov's form."""
    beta1: float = 0.9
    """Of AdamW, as `beta2` and `eps`."""
    beta2: float = 0.95
    eps: float = 1e-8
    width_power: ClassVar[float] = 0.5
    moments: Moments = 'float32'
    """How momentum and moments are stored; they are updated in float32."""

    def directions(self) -> optax.GradientTransformation:
        momentum = stored(optax.trace(self.beta, nesterov=True), self.moments)
        return optax.partition(
            {
                'muon': optax.chain(momentum, optax.stateless(_orthogonal)),
                'adamw': adam(self),
            },
            lambda params: map_named(
                lambda path, _: 'muon' if is_hidden(path) else 'adamw', params
            ),
        )

    def limits(self) -> tuple[Limit, ...]:
        return share('beta', self.beta), *adam_limits(self)

    def check(self) -> None:
        super().check()
        check_stored(self.moments, beta=self.beta, beta1=self.beta1, beta2=self.beta2)


def is_hidden(path: str) -> bool:
    """Whether the parameter at a dotted path is a matrix that Muon moves: one of a layer, also of
    layers that an objective adds."""
    return path.rsplit('.', 1)[-1] in INPUTS


def _orthogonal(updates: Any, params: Any) -> Any:
    return map_named(_scaled, updates)


def _scaled(path: str, x: jax.Array) -> jax.Array:
    """The orthogonalised direction of a parameter, stacked or of one layer."""
    letters = layout.letters_of(path, x.ndim)
    stacked = x if letters.startswith('L') else x[None]
    n_inputs = len(INPUTS[path.rsplit('.', 1)[-1]])

    def of_layers(x: jax.Array) -> jax.Array:
        L, *shape = x.shape
        fan_in, fan_out = math.prod(shape[:n_inputs]), math.prod(shape[n_inputs:])
        x_LIO = orthogonalized(x.reshape(L, fan_in, fan_out))
        return (RMS * math.sqrt(max(fan_in, fan_out)) * x_LIO).reshape(x.shape)

    return layout.by_layer(of_layers, stacked, letters.removeprefix('L')).reshape(x.shape)


def orthogonalized(x_LIO: jax.Array) -> jax.Array:
    """Each matrix with its singular values brought near 1, by five Newton-Schulz iterations; zeros
    stay zeros."""
    # Optax has the iterations as a part of Muon alone: here of one without momentum.
    alone = optax.contrib.scale_by_muon(
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2),
    )
    directions, _ = alone.update(x_LIO, alone.init(x_LIO))
    return directions

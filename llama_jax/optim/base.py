"""What all optimizers share: the protocol, clipping, weight decay, and the chain that is made of
them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llama_jax.errors import UserError
from llama_jax.layout import letters_of
from llama_jax.model.width import Width
from llama_jax.optim.depth import by_depth
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.optim.spikes import LEAST_DEVIATIONS, without_spikes
from llama_jax.optim.width import by_width
from llama_jax.trees import map_named

Moments = Literal['float32', 'bfloat16']


class Limit(NamedTuple):
    """A setting, whether its value fits, and what would."""

    name: str
    value: float
    fits: bool
    wanted: str


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer is a frozen dataclass of this kind. `directions` is what it adds."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    weight_decay: float = 0.1
    """Decoupled: parameters shrink by the learning rate times this (Loshchilov & Hutter 2019)."""
    decay_embeddings: bool = False
    """Also decay the embeddings (of tokens and positions) and the head. Norms and biases are never
    decayed."""
    clip: float = 1.0
    """Gradients are scaled down to this global norm."""
    layer_decay: float = 1.0
    """Each layer learns by this factor more slowly than the one above it, the embeddings more
    slowly than the first (Clark et al. 2020: 0.8 to 0.9); see optim/depth.py. 1: all alike."""
    average: float = 0.0
    """Decay of an exponential moving average of the parameters (0.99 to 0.9999). It is what
    validations, samples and whoever loads the run read; training goes on with the parameters
    themselves. 0: there is none."""
    spikes: float = 0.0
    """An update is skipped whose loss is more than so many standard deviations above the running
    mean of about the last 100 (4 to 8); see optim/spikes.py. 0: none is."""

    width_power: ClassVar[float] = 1.0
    """The learning rate of a matrix falls with the width to this power, under muP."""

    def directions(self) -> optax.GradientTransformation:
        """From clipped gradients to directions, of which the step subtracts the learning rate times
        each. Their state is named as parameters are, so that it is placed as they are."""
        raise NotImplementedError

    def limits(self) -> tuple[Limit, ...]:
        """Of the settings that it adds."""
        return ()

    def check(self) -> None:
        """Raise UserError for unfit settings."""
        shared = (
            Limit(
                *('weight-decay', self.weight_decay),
                *(0 <= self.weight_decay < math.inf, '0 or more, and finite'),
            ),
            Limit('clip', self.clip, self.clip > 0, 'positive'),
            Limit('layer-decay', self.layer_decay, 0 < self.layer_decay <= 1, 'in (0, 1]'),
            Limit('average', self.average, 0 <= self.average < 1, 'in [0, 1)'),
            Limit(
                *(
                    'spikes',
                    self.spikes,
                    self.spikes == 0 or LEAST_DEVIATIONS <= self.spikes < math.inf,
                ),
                f'0, or {LEAST_DEVIATIONS:g} and more: by less nearly every step is a spike',
            ),
        )
        for name, value, fits, wanted in (*self.limits(), *shared):
            if not fits:
                raise UserError(f'--optimizer.{name} is {value}: it must be {wanted}')


def share(name: str, value: float) -> Limit:
    """The limit of a decay: in [0, 1)."""
    return Limit(name, value, 0 <= value < 1, 'in [0, 1)')


def optimizer(config: OptimizerConfig, width: Width | None = None) -> optax.GradientTransformation:
    """The optimizer without its learning rate: the step subtracts `rate` times what this returns.
    `width` is that of the model; None: rates are as they are set.

    So the rate depends on the number of the step alone, and the state neither on rate, clip nor
    decay, which may change while a run goes on. Raises UserError for unfit settings.
    """
    config.check()
    directions = config.directions()
    if width is not None and width != Width(width.base):
        directions = by_width(directions, width, power=config.width_power)
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip),
        directions,
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: decayed(params, embeddings=config.decay_embeddings),
        ),
    )
    tx = tx if config.layer_decay == 1.0 else by_depth(tx, config.layer_decay)
    return without_spikes(tx, config.spikes) if config.spikes else tx


def stored(tx: optax.GradientTransformation, moments: Moments) -> optax.GradientTransformation:
    """`tx`, whose state is stored as `moments` says and updated in float32."""
    if moments == 'float32':
        return tx

    def cast(state: Any, dtype: str) -> Any:
        floating = jnp.floating
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, floating) else x, state
        )

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        directions, state = tx.update(grads, cast(state, 'float32'), params)
        return directions, cast(state, moments)

    return optax.GradientTransformation(lambda params: cast(tx.init(params), moments), update)


def decayed(params: Any, *, embeddings: bool) -> Any:
    """True for every parameter that weight decay applies to: matrices of the layers."""

    def is_decayed(path: str, leaf: Any) -> bool:
        embedded = bool(set('VC') & set(letters_of(path, leaf.ndim)))
        return is_matrix(path, leaf) and (embeddings or not embedded)

    return map_named(is_decayed, params)


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether the parameter of a layer is a matrix: of two letters or more, and no bias."""
    letters = letters_of(path, leaf.ndim).replace('L', '')
    return len(letters) > 1 and not path.removesuffix(f'_{letters}').endswith('bias')


_SLOWEST_OF_BFLOAT16 = 0.99
"""bfloat16 keeps 8 bits: a moment that falls by less than 0.4% a step rounds back to where it was,
and never falls."""


def check_stored(moments: str, option: str = 'moments', **decays: float) -> None:
    """Raise UserError where the type of a moment cannot hold how slowly one of `decays` falls."""
    for name, decay in decays.items():
        if moments == 'bfloat16' and decay > _SLOWEST_OF_BFLOAT16:
            raise UserError(
                f'--optimizer.{option} bfloat16 cannot hold the small changes of '
                f'--optimizer.{name} {decay}: set it to {_SLOWEST_OF_BFLOAT16} or less, or '
                f'--optimizer.{option} float32'
            )

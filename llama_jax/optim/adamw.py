"""AdamW (Loshchilov & Hutter 2019) with global-norm clipping and a decay mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import optax

from llama_jax.errors import UserError
from llama_jax.layout import letters_of
from llama_jax.optim.depth import by_depth
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.trees import map_named


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Defaults are LLaMA's (Touvron et al. 2023, section 2.3)."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    """Also decay the embeddings (of tokens and positions) and the head. Norms and biases are never
    decayed."""
    clip: float = 1.0
    """Gradients are scaled down to this global norm."""
    moments: Literal['float32', 'bfloat16'] = 'float32'
    """How both moments are stored: 'bfloat16' takes 4 bytes per parameter less (DeepSeek-AI 2024,
    section 3.3). They are updated in float32 all the same."""
    layer_decay: float = 1.0
    """Each layer learns by this factor more slowly than the one above it, the embeddings more
    slowly than the first (Clark et al. 2020: 0.8 to 0.9); see optim/depth.py. 1: all alike."""
    average: float = 0.0
    """Decay of an exponential moving average of the parameters (0.99 to 0.9999). It is what
    validations, samples and whoever loads the run read; training goes on with the parameters
    themselves. 0: there is none."""


_BETA2_OF_BFLOAT16 = 0.99
"""bfloat16 keeps 8 bits: a second moment that falls by less than 0.4% a step rounds back to where
it was, and never falls."""


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate: the step subtracts `rate` times what this returns.

    So the rate depends on the number of the step alone, and the state neither on rate, clip nor
    decay, which may change while a run goes on. Raises UserError for unfit settings.
    """
    for name, value, fits, wanted in (
        ('beta1', config.beta1, 0 <= config.beta1 < 1, 'in [0, 1)'),
        ('beta2', config.beta2, 0 <= config.beta2 < 1, 'in [0, 1)'),
        ('eps', config.eps, config.eps > 0, 'positive'),
        ('weight-decay', config.weight_decay, config.weight_decay >= 0, '0 or more'),
        ('clip', config.clip, config.clip > 0, 'positive'),
        ('layer-decay', config.layer_decay, 0 < config.layer_decay <= 1, 'in (0, 1]'),
        ('average', config.average, 0 <= config.average < 1, 'in [0, 1)'),
    ):
        if not fits:
            raise UserError(f'--optimizer.{name} is {value}: it must be {wanted}')
    if config.moments == 'bfloat16' and config.beta2 > _BETA2_OF_BFLOAT16:
        raise UserError(
            f'--optimizer.moments bfloat16 cannot hold the small changes of --optimizer.beta2 '
            f'{config.beta2}: set --optimizer.beta2 {_BETA2_OF_BFLOAT16} or less, or '
            '--optimizer.moments float32'
        )
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip),
        _adam(config),
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: decayed(params, embeddings=config.decay_embeddings),
        ),
    )
    return tx if config.layer_decay == 1.0 else by_depth(tx, config.layer_decay)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Optax's Adam, whose second moment is stored as the first: it keeps the type it has."""
    dtype = jnp.dtype(config.moments)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=dtype)

    def init(params: Any) -> optax.OptState:
        state = adam.init(params)
        return state._replace(nu=optax.tree.cast(state.nu, dtype))

    return optax.GradientTransformation(init, adam.update)


def decayed(params: Any, *, embeddings: bool) -> Any:
    """True for every parameter that weight decay applies to: matrices of the layers."""

    def is_decayed(path: str, leaf: Any) -> bool:
        letters = letters_of(path, leaf.ndim).replace('L', '')
        bias = path.removesuffix(f'_{letters}').endswith('bias')
        embedded = bool(set('VC') & set(letters))
        return len(letters) > 1 and not bias and (embeddings or not embedded)

    return map_named(is_decayed, params)

"""AdamW (Loshchilov & Hutter 2019) with global-norm clipping and a decay mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import optax

from llama_jax.errors import UserError
from llama_jax.layout import letters_of
from llama_jax.optim.schedule import ScheduleConfig, schedule
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


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a run of `steps`. Raises UserError for unfit settings."""
    for name, value, fits, wanted in (
        ('beta1', config.beta1, 0 <= config.beta1 < 1, 'in [0, 1)'),
        ('beta2', config.beta2, 0 <= config.beta2 < 1, 'in [0, 1)'),
        ('eps', config.eps, config.eps > 0, 'positive'),
        ('weight-decay', config.weight_decay, config.weight_decay >= 0, '0 or more'),
        ('clip', config.clip, config.clip > 0, 'positive'),
    ):
        if not fits:
            raise UserError(f'--optimizer.{name} is {value}: it must be {wanted}')
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config.schedule, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: decayed(params, embeddings=config.decay_embeddings),
        ),
    )


def decayed(params: Any, *, embeddings: bool) -> Any:
    """True for every parameter that weight decay applies to: matrices of the layers."""

    def is_decayed(path: str, leaf: Any) -> bool:
        letters = letters_of(path, leaf.ndim).replace('L', '')
        bias = path.removesuffix(f'_{letters}').endswith('bias')
        embedded = bool(set('VC') & set(letters))
        return len(letters) > 1 and not bias and (embeddings or not embedded)

    return map_named(is_decayed, params)

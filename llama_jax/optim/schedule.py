"""Learning-rate schedules: linear warm-up, then cosine or warm-up-stable-decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import optax

from llama_jax.errors import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps of a run."""

    peak: float = 3e-4
    kind: Literal['cosine', 'wsd', 'constant'] = 'cosine'
    """'cosine' falls over the whole run (Loshchilov & Hutter 2017); 'wsd' stays at the peak, then
    falls linearly (Hu et al. 2024)."""
    warmup_steps: int = 2000
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    decay_share: float = 0.2
    """Share of the run over which 'wsd' falls."""


def schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, for a run of `steps`. Raises UserError for settings without sense."""
    _check(config)
    if config.warmup_steps >= steps and steps > 0:
        raise UserError(
            f'a warm-up of {config.warmup_steps} steps leaves nothing of a run of {steps}: '
            'lower --optimizer.schedule.warmup-steps or raise --train.steps'
        )
    # The first step already learns: its rate is one part of the warm-up, not zero.
    warmup = optax.linear_schedule(
        config.peak / (config.warmup_steps + 1), config.peak, config.warmup_steps
    )
    after = steps - config.warmup_steps
    if config.kind == 'constant':
        return optax.join_schedules(
            [warmup, optax.constant_schedule(config.peak)], [config.warmup_steps]
        )
    if config.kind == 'cosine':
        cosine = optax.cosine_decay_schedule(config.peak, after, alpha=config.final)
        return optax.join_schedules([warmup, cosine], [config.warmup_steps])
    decay_steps = round(after * config.decay_share)
    stable = optax.constant_schedule(config.peak)
    decay = optax.linear_schedule(config.peak, config.peak * config.final, decay_steps)
    return optax.join_schedules([warmup, stable, decay], [config.warmup_steps, steps - decay_steps])


def _check(config: ScheduleConfig) -> None:
    for option, value, fits, wanted in (
        ('peak', config.peak, config.peak > 0, 'positive'),
        ('warmup-steps', config.warmup_steps, config.warmup_steps >= 0, '0 or more'),
        ('final', config.final, 0 <= config.final <= 1, 'in [0, 1]'),
        ('decay-share', config.decay_share, 0 <= config.decay_share <= 1, 'in [0, 1]'),
    ):
        if not fits:
            raise UserError(f'--optimizer.schedule.{option} is {value}: it must be {wanted}')

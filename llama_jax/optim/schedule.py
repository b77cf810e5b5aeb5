"""Learning-rate schedules: linear warm-up, then cosine, warm-up-stable-decay or an inverse square
root; and how a run comes from one to another while it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import optax

from llama_jax.errors import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps of a run."""

    peak: float = 3e-4
    kind: Literal['cosine', 'wsd', 'inverse_sqrt', 'constant'] = 'cosine'
    """'cosine' falls over the whole run (Loshchilov & Hutter 2017); 'wsd' stays at the peak, then
    falls linearly (Hu et al. 2024); 'inverse_sqrt' falls as 1 / sqrt(step) from the end of the
    warm-up (Vaswani et al. 2017), whatever the length of the run."""
    warmup_steps: int = 2000
    """Steps over which it rises to the peak."""
    warmup_share: float = 0.0
    """Instead of `warmup_steps`: share of the run, for one whose steps are counted from epochs."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    decay_share: float = 0.2
    """Share of the steps after the warm-up over which 'wsd' falls."""

    def warmup(self, steps: int) -> int:
        """Steps of warm-up of a run of `steps`."""
        return self.warmup_steps or min(math.ceil(self.warmup_share * steps), max(steps - 1, 0))

    def decay_steps(self, steps: int) -> int:
        """Steps over which 'wsd' falls, the last of a run of `steps`."""
        return max(1, round((steps - self.warmup(steps)) * self.decay_share))


@dataclass(frozen=True)
class Ramp:
    """A straight line to a schedule that came into force in the midst of a run."""

    begin: int
    """Steps taken by then."""
    rate: float
    """Learning rate that the run had."""
    steps: int
    """After so many more, the rate is that of the schedule."""


def schedule(config: ScheduleConfig, steps: int, ramp: Ramp | None = None) -> optax.Schedule:
    """Learning rate by steps taken, for a run of `steps`. Raises UserError for settings without
    sense."""
    rate = _schedule(config, steps)
    if ramp is None:
        return rate
    end = ramp.begin + ramp.steps
    line = optax.linear_schedule(ramp.rate, float(rate(end)), ramp.steps, ramp.begin)
    return lambda step: jnp.where(step < end, line(step), rate(step))


def change(
    old: optax.Schedule, config: ScheduleConfig, steps: int, *, taken: int, at_once: bool
) -> Ramp | None:
    """How a run that has `taken` steps under `old` comes to another schedule; None: it is there.

    The rate moves in a straight line to the new schedule, over the steps of its warm-up (a tenth of
    those left where it has none), as re-warming does for a model that is trained further (Ibrahim
    et al. 2024, section 4). A lower rate holds `at_once` where that is asked for.
    """
    before, after = (float(rate(taken)) for rate in (old, _schedule(config, steps)))
    left = steps - taken
    if left < 1 or math.isclose(before, after, rel_tol=1e-6) or (at_once and after < before):
        return None
    return Ramp(taken, before, min(config.warmup(steps) or math.ceil(left / 10), left))


def _schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    _check(config)
    up = config.warmup(steps)
    if config.warmup_steps >= steps and steps > 0:
        raise UserError(
            f'a warm-up of {config.warmup_steps} steps leaves nothing of a run of {steps}: '
            'lower --optimizer.schedule.warmup-steps or train longer'
        )
    # The first step already learns: its rate is one part of the warm-up, not zero.
    warmup = optax.linear_schedule(config.peak / (up + 1), config.peak, up)
    after = steps - up
    if config.kind == 'constant':
        return optax.join_schedules([warmup, optax.constant_schedule(config.peak)], [up])
    if config.kind == 'inverse_sqrt':
        last = up + 1
        return lambda step: jnp.where(
            step < up, warmup(step), config.peak * jnp.sqrt(last / jnp.maximum(step + 1, last))
        )
    if config.kind == 'cosine':
        cosine = optax.cosine_decay_schedule(config.peak, after, alpha=config.final)
        return optax.join_schedules([warmup, cosine], [up])
    decay_steps = config.decay_steps(steps)
    stable = optax.constant_schedule(config.peak)
    decay = optax.linear_schedule(config.peak, config.peak * config.final, decay_steps)
    return optax.join_schedules([warmup, stable, decay], [up, steps - decay_steps])


def _check(config: ScheduleConfig) -> None:
    for option, value, fits, wanted in (
        ('peak', config.peak, 0 < config.peak < math.inf, 'positive and finite'),
        ('warmup-steps', config.warmup_steps, config.warmup_steps >= 0, '0 or more'),
        ('warmup-share', config.warmup_share, 0 <= config.warmup_share < 1, 'in [0, 1)'),
        ('final', config.final, 0 <= config.final <= 1, 'in [0, 1]'),
        (
            *('decay-share', config.decay_share, 0 < config.decay_share <= 1),
            'in (0, 1]; what never falls is --optimizer.schedule.kind constant',
        ),
    ):
        if not fits:
            raise UserError(f'--optimizer.schedule.{option} is {value}: it must be {wanted}')
    usual = ScheduleConfig()
    for option, value, other, kinds in (
        ('decay-share', config.decay_share, usual.decay_share, ('wsd',)),
        ('final', config.final, usual.final, ('wsd', 'cosine')),
    ):
        if value != other and config.kind not in kinds:
            raise UserError(
                f'--optimizer.schedule.{option} {value} has no effect on the kind {config.kind}: '
                f'leave it out, or set it to {other} where the configuration has it'
            )
    if config.warmup_steps and config.warmup_share:
        raise UserError(
            f'--optimizer.schedule.warmup-steps {config.warmup_steps} and --optimizer.schedule.'
            f'warmup-share {config.warmup_share} are both set: set one of them to 0'
        )

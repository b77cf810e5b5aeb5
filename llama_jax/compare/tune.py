"""The learning rate of each arm, chosen by its own held-out loss under the first seed, before all
seeds are run at it: a comparison at one rate compares how well it suits each objective."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_jax.compare.grid import FINISHED, LOG, Grid, Planned, at_place, with_rate
from llama_jax.errors import UserError
from llama_jax.report.read import read_object

FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the arm's own peak learning rate: wide, for objectives differ by more than 10."""
FIELD = 'optimizer.schedule.peak'
"""In which the arms of a tuned grid may differ."""
LOSS = 'loss'
"""Of a run that was made to choose a rate: all that its evaluation.json has."""


@dataclass(frozen=True)
class Tuned:
    """The rates of one arm."""

    losses: Mapping[float, float | None]
    """Peak learning rate to held-out loss; None where it was not finite."""

    @property
    def rate(self) -> float:
        """Of the lowest loss."""
        return min((loss, rate) for rate, loss in self.losses.items() if loss is not None)[1]

    @property
    def at_the_edge(self) -> bool:
        """Whether no rate beyond the chosen one was tried, on one side."""
        return self.rate in (min(self.losses), max(self.losses))

    def facts(self) -> dict[str, Any]:
        """For grid.json."""
        losses = {f'{rate:g}': loss for rate, loss in sorted(self.losses.items())}
        return {'rate': self.rate, 'at_the_edge': self.at_the_edge, 'losses': losses}


def check(grid: Grid, factors: Sequence[float]) -> None:
    """Raise UserError for rates that cannot be chosen from."""
    for factor in factors:
        if not 0 < factor < math.inf:
            raise UserError(f'--tune-rates {factor:g}: it must be positive')
    if len(set(factors)) < 2:
        raise UserError('--tune-rates: give two factors or more, or none for the usual ones')
    for arm in grid.arms:
        if not arm.experiment.evaluation.every:
            raise UserError(
                f'arm {arm.name}: rates are chosen by held-out loss, and --evaluation.every is 0: '
                'set it'
            )


def runs(grid: Grid, factors: Sequence[float]) -> list[Planned]:
    """Every arm at each factor of its rate, under the first seed."""
    planned = []
    for factor in sorted(set(factors)):
        for arm in grid.arms:
            rate = arm.experiment.optimizer.schedule.peak * factor
            planned.append(at_place(arm, f'{arm.name}/lr-{rate:g}/seed-0'))
    return planned


def chosen(planned: Sequence[Planned], workdir: Path) -> dict[str, Tuned]:
    """The rates of each arm, of runs that are made. Raises UserError for an arm that was trained to
    no finite loss at any rate."""
    losses: dict[str, dict[float, float | None]] = {}
    for run in planned:
        told = read_object(run.directory(workdir) / FINISHED) or {}
        value = told.get(LOSS)
        rate = run.experiment.optimizer.schedule.peak
        finite = isinstance(value, float) and math.isfinite(value)
        losses.setdefault(run.arm, {})[rate] = value if finite else None
    for arm, of_rates in losses.items():
        if not any(loss is not None for loss in of_rates.values()):
            rates = ', '.join(f'{rate:g}' for rate in of_rates)
            raise UserError(f'arm {arm}: no finite loss at any rate ({rates}): give lower factors')
    return {arm: Tuned(of_rates) for arm, of_rates in losses.items()}


def check_found(planned: Sequence[Planned], found: Mapping[str, Any], workdir: Path) -> None:
    """Raise UserError where the rates of an arm were chosen, as `found` tells, without one that is
    planned: it would not be tried any more."""
    for run in planned:
        losses = found.get(run.arm, {}).get('losses')
        rate = f'{run.experiment.optimizer.schedule.peak:g}'
        if losses is not None and rate not in losses:
            raise UserError(
                f'the rate of {run.arm} was chosen in {workdir} of {", ".join(losses)}, and {rate} '
                'would not be tried: give the --tune-rates and the settings it was begun with, or '
                'another --workdir'
            )


def at_rates(grid: Grid, rates: Mapping[str, float]) -> Grid:
    """The grid with each arm at its rate; an arm that has none yet keeps its own."""
    arms = tuple(
        replace(arm, experiment=with_rate(arm.experiment, rates[arm.name]))
        if arm.name in rates
        else arm
        for arm in grid.arms
    )
    return replace(grid, arms=arms, may_differ=tuple(dict.fromkeys([*grid.may_differ, FIELD])))


def take_over(grid: Grid, workdir: Path) -> None:
    """Begin the run of each arm under the first seed with the one that chose its rate: it is the
    same, and trained already."""
    for arm in grid.arms:
        rate = arm.experiment.optimizer.schedule.peak
        made, own = workdir / arm.name / f'lr-{rate:g}' / 'seed-0', workdir / arm.name / 'seed-0'
        if own.exists() or not (made / FINISHED).exists():
            continue
        partial = own.with_name('seed-0.partial')
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(made, partial, ignore=shutil.ignore_patterns(FINISHED, LOG, 'lock'))
        partial.rename(own)

"""A grid: arms that differ in what is compared and in nothing else, under several seeds.

WORKDIR/ARM/seed-K/ is the directory of a run as pretrain writes it, WORKDIR/ARM/lr-RATE/seed-K/
that of a learning rate that is tried, and WORKDIR/ARM/again/seed-K/ that of the first arm under
other seeds: the A/A arm, which says what seeds alone do.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llama_jax.errors import UserError
from llama_jax.evaluate.suite import Suite
from llama_jax.report.baselines import FOLDER as BASELINES
from llama_jax.train.experiment import Experiment, from_dict, to_dict

FINISHED = 'evaluation.json'
"""Written last, so that it marks a run as finished."""

PER_TEXT = 'evaluation.npz'
"""What each text contributes to the metrics (evaluate/per_text.py)."""

LOG = 'log.txt'

FACTORS = (0.5, 1.0, 2.0)
"""Of the peak learning rate, in a sweep."""

AGAIN_SEED = 1000
"""The A/A arm's runs have the seeds 1000, 1001, ..."""

Match = Literal['tokens', 'flops', 'text']


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared."""

    name: str
    """Of its directory, and in tables."""
    experiment: Experiment
    """With any seed: each run has its own."""


@dataclass(frozen=True)
class Grid:
    """A comparison: every arm under seeds 0, 1, ..."""

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: int
    suite: Suite
    """What is measured of every run, once it is trained."""
    may_differ: tuple[str, ...] = ('name', 'objective')
    """Fields of an experiment, or groups of them, in which arms may differ: what is compared."""
    again: bool = True
    """Whether the first arm is also run under other seeds, which gives the noise floor."""
    baselines: bool = True
    """Whether untrained backbones, counts of tokens and chance are measured beside the arms."""
    match: Match = 'tokens'
    """What every arm has as much of as the first. Nothing that `may_differ` names lifts it."""
    tuned: str = ''
    """How the learning rate of each arm was chosen, where it was not by this comparison; '' for not
    at all: the report is then called untuned."""


@dataclass(frozen=True)
class Planned:
    """One run of a grid."""

    arm: str
    place: str
    """Its directory below the working directory, such as 'causal/seed-0'."""
    experiment: Experiment

    def directory(self, workdir: Path) -> Path:
        return workdir / self.place

    def finished(self, workdir: Path) -> bool:
        """Whether it is trained and evaluated."""
        return (self.directory(workdir) / FINISHED).exists()


def runs(grid: Grid) -> list[Planned]:
    """Every run of the grid: all arms under the first seed, then under the next, so that a grid
    which is cut short has something to say about every arm."""
    base = grid.arms[0]
    planned = []
    for seed in range(grid.seeds):
        planned += [at_place(arm, f'{arm.name}/seed-{seed}') for arm in grid.arms]
        if grid.again:
            planned.append(at_place(base, f'{base.name}/again/seed-{AGAIN_SEED + seed}'))
    return planned


def sweep(grid: Grid, factors: Sequence[float]) -> list[Planned]:
    """Runs of every arm under the first seed at its peak learning rate times each factor. A factor
    of 1 is the grid's own run."""
    planned = []
    if {*factors} == {1.0}:
        raise UserError('--lr-sweep 1: that is the rate of the runs themselves; give other factors')
    for factor in factors:
        if not 0 < factor < math.inf:
            raise UserError(f'--lr-sweep {factor:g}: it must be positive')
        for arm in grid.arms if factor != 1 else ():
            rate = arm.experiment.optimizer.schedule.peak * factor
            planned.append(at_place(arm, f'{arm.name}/lr-{rate:g}/seed-0'))
    return planned


def at_place(arm: Arm, place: str) -> Planned:
    """The run of the arm whose directory is `place`: 'ARM/seed-K', 'ARM/again/seed-K' or
    'ARM/lr-RATE/seed-K'."""
    found = re.fullmatch(r'[^/]+/(?:lr-([^/]+)/|again/)?seed-(\d+)', place)
    if found is None:
        raise UserError(f'{place!r} is no run: name one as ARM/seed-K or ARM/lr-RATE/seed-K')
    rate, seed = found.groups()
    experiment = replace(arm.experiment, seed=int(seed))
    if rate is not None:
        experiment = with_rate(experiment, float(rate))
    return Planned(arm.name, place, experiment)


def with_rate(experiment: Experiment, peak: float) -> Experiment:
    """The experiment at another peak learning rate."""
    schedule = replace(experiment.optimizer.schedule, peak=peak)
    return replace(experiment, optimizer=replace(experiment.optimizer, schedule=schedule))


def only(grid: Grid, planned: Sequence[Planned], arms: Sequence[str]) -> list[Planned]:
    """The runs of the arms that are named; of all where none is. Raises UserError with the nearest
    name for an arm that is not there."""
    names = [arm.name for arm in grid.arms]
    for arm in arms:
        if arm not in names:
            raise UserError(f'{grid.name} has no arm {arm!r}: {nearest(arm, names)}')
    return [run for run in planned if not arms or run.arm in arms]


def nearest(name: str, names: Sequence[str]) -> str:
    """What to say of a name that is not among `names`."""
    near = difflib.get_close_matches(name, names, n=1)
    return f'did you mean {near[0]!r}?' if near else f'there are {", ".join(names)}'


def allowed(field: str, may_differ: Iterable[str]) -> bool:
    """Whether `may_differ` names the dotted field, or a group that it is in."""
    return any(field == name or field.startswith(name + '.') for name in may_differ)


def check_names(grid: Grid) -> None:
    """Raise UserError for a grid that cannot be laid out in directories."""
    if not grid.arms:
        raise UserError(f'the grid {grid.name} has no arm')
    if grid.seeds < 1:
        raise UserError(f'--seeds {grid.seeds}: a grid has one seed or more')
    if grid.seeds > AGAIN_SEED:
        raise UserError(f'--seeds {grid.seeds}: the A/A arm has those from {AGAIN_SEED} on')
    for arm in grid.arms:
        if arm.name == BASELINES:
            raise UserError(f'an arm called {BASELINES!r}: that is the directory of baselines')
        if not re.fullmatch(r'\w[\w.+-]*', arm.name):
            raise UserError(
                f'arm {arm.name!r}: its name is that of a directory; use letters, digits and _.+-'
            )
    names = [arm.name for arm in grid.arms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'two arms of {grid.name} are called {name!r}: rename one of them')


def check_steps(grid: Grid) -> None:
    """Raise UserError for arms whose length is not given in steps, by which they are matched."""
    for arm in grid.arms:
        train = arm.experiment.train
        for name in ('tokens', 'epochs'):
            if value := getattr(train, name):
                raise UserError(
                    f'arm {arm.name}: --train.{name} {value} cannot be set in a grid, whose arms '
                    'are matched by their steps: set --train.steps instead'
                )
        if patience := arm.experiment.evaluation.patience:
            raise UserError(
                f'arm {arm.name}: --evaluation.patience {patience} cannot be set in a grid, whose '
                'arms are matched by their steps: leave it out'
            )
        if train.steps < 1:
            raise UserError(f'arm {arm.name}: --train.steps is {train.steps}: set it to 1 or more')


def common(experiment: Experiment) -> dict[str, Any]:
    """The settings that can be overridden for all arms at once, by field of an experiment."""
    own = ('name', 'objective', 'seed')
    fields = [field.name for field in dataclasses.fields(experiment) if field.name not in own]
    return {name: getattr(experiment, name) for name in fields}


_RATES_GO_BY = ('model', 'data', 'train', 'optimizer', 'objective', 'start', 'tune')
"""Parts of an experiment with which the best learning rate changes."""


def overridden(grid: Grid, settings: dict[str, Any]) -> Grid:
    """The grid with the values of `settings` that differ from those of the first arm, in every arm.

    `settings` are parts of an experiment, as `common` gives them. Rates that were chosen for other
    settings are not called chosen any more.
    """
    first = grid.arms[0].experiment
    changes = list(_changes(to_dict(first), to_dict(replace(first, **settings))))
    if not changes:
        return grid
    arms = []
    for arm in grid.arms:
        plain = to_dict(arm.experiment)
        for (*groups, last), value in changes:
            inner = plain
            for group in groups:
                inner = inner[group]
            inner[last] = value
        arms.append(replace(arm, experiment=_as_long(arm.experiment, from_dict(plain))))
    kept = all(path[0] not in _RATES_GO_BY for path, _ in changes)
    return replace(grid, arms=tuple(arms), tuned=grid.tuned if kept else '')


def _as_long(before: Experiment, after: Experiment) -> Experiment:
    """`after`, where steps that its objective counts are in proportion to those of the run."""
    if not before.train.steps or not after.train.steps:
        return after
    ratio = after.train.steps / before.train.steps
    return replace(after, objective=after.objective.stretched(ratio)) if ratio != 1 else after


def _changes(before: Any, after: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Paths into nested dicts and lists of what is not the same, with the new value."""
    pairs: Any
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        pairs = ((key, before[key], after[key]) for key in before)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = ((i, *both) for i, both in enumerate(zip(before, after, strict=True)))
    else:
        if before != after:
            yield path, after
        return
    for key, one, other in pairs:
        yield from _changes(one, other, (*path, key))

"""Reads the records of a comparison, whole or not: arms may be missing, running, killed or broken.

WORKDIR/grid.json says what was planned; WORKDIR/ARM/seed-K/ is a run directory with evaluation.json
beside its records, and so are WORKDIR/ARM/lr-RATE/seed-K/ of a sweep of learning rates and
WORKDIR/ARM/again/seed-K/ of the base arm under other seeds (the A/A arm).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.evaluate import per_text
from llama_jax.evaluate.paired import Sample
from llama_jax.evaluate.per_text import PerText
from llama_jax.report.baselines import Baseline, read_baselines
from llama_jax.report.read import Line, RunRecords, inside, last, number, read, read_object

EVALUATION = 'evaluation.json'
LOG = 'log.txt'
"""What the process of a run prints, beside its records."""
_LONGEST = 200
"""Characters of what is shown of a failure."""

AGAIN = 'again'
"""The folder of an arm's runs under other seeds."""
FINISHED = 'finished'
TRAINED = 'trained, not evaluated'
EXACT = 'exact'


@dataclass(frozen=True)
class SeedRun:
    """One run of an arm."""

    seed: int
    state: str
    """'finished', or in words how far it is."""
    records: RunRecords | None = None
    """None where no run was begun."""
    evaluation: Line = field(default_factory=dict)
    """evaluation.json; empty when there is none."""
    texts: dict[str, PerText] = field(default_factory=dict)
    """What each text adds to the metrics, of those that are a mean over texts."""

    def metric(self, name: str) -> float | None:
        """Value of a metric; None where it was not measured or does not apply."""
        return number(self.evaluation, 'metrics', name, 'value')

    def kind(self, name: str) -> str:
        """What kind of figure it is: 'exact', or a bound, or a pseudo-likelihood; '' if unknown."""
        return self._said(name, 'kind')

    def by(self, name: str) -> str:
        """By what kind of likelihood the choices of a task were weighed; '' of other metrics."""
        return self._said(name, 'by')

    def _said(self, name: str, what: str) -> str:
        found = inside(self.evaluation, 'metrics', name, what)
        return found if isinstance(found, str) else ''

    def applies(self, name: str) -> bool:
        """False where the evaluation was made and says that `name` does not apply."""
        metrics = self.evaluation.get('metrics')
        return not isinstance(metrics, dict) or self.metric(name) is not None

    @property
    def done(self) -> bool:
        return self.state == FINISHED

    @property
    def trained(self) -> bool:
        """Whether all its steps are taken, to losses that are finite."""
        return self.state.startswith((FINISHED, TRAINED))

    @property
    def learning_rate(self) -> float | None:
        facts = self.records.facts if self.records else {}
        return number(facts, 'experiment', 'optimizer', 'schedule', 'peak')


@dataclass(frozen=True)
class ArmRecords:
    """An arm; all arms have the same number of seeds."""

    name: str
    index: int
    """Its place in the grid, which gives its colour."""
    facts: Line
    """Its entry in grid.json."""
    runs: list[SeedRun]
    sweep: list[SeedRun] = field(default_factory=list)
    """Runs at other learning rates."""
    again: list[SeedRun] = field(default_factory=list)
    """Runs under other seeds, to compare the arm with itself."""

    def values(self, metric: str) -> list[float]:
        """The metric of every seed that has it."""
        return [x for x in (run.metric(metric) for run in self.runs) if x is not None]

    def kind(self, metric: str) -> str:
        """What kind of figure its runs have."""
        return next(filter(None, (run.kind(metric) for run in self.runs)), EXACT)

    def by(self, metric: str) -> str:
        """By what its runs weighed the choices of a task."""
        return next(filter(None, (run.by(metric) for run in self.runs)), '')

    def sample(self, metric: str) -> Sample:
        """The metric over the seeds, with what each text adds to it."""
        return _sample(self.runs, metric)

    def sample_again(self, metric: str) -> Sample:
        """The same under the other seeds."""
        return _sample(self.again, metric)

    @property
    def done(self) -> bool:
        return all(run.done for run in self.runs)


@dataclass(frozen=True)
class GridRecords:
    """All records of a comparison, arms in the order of the grid."""

    title: str
    facts: Line
    """grid.json"""
    arms: list[ArmRecords]
    problems: list[str] = field(default_factory=list)
    """Sentences about what could not be read."""
    baselines: list[Baseline] = field(default_factory=list)

    @property
    def runs(self) -> Iterator[tuple[ArmRecords, SeedRun]]:
        return ((arm, run) for arm in self.arms for run in arm.runs)


def _sample(runs: list[SeedRun], metric: str) -> Sample:
    values, texts = {}, {}
    for run in runs:
        value = run.metric(metric)
        if value is None:
            continue
        values[run.seed] = value
        kept = run.texts.get(metric)
        if kept is None:
            continue
        # Not those of an evaluation that was written over.
        of_texts = float(kept.over.sum() / kept.under.sum())
        if math.isclose(of_texts, value, rel_tol=1e-6, abs_tol=1e-9):
            texts[run.seed] = kept
    return Sample(values, texts)


def read_grid(workdir: Path) -> GridRecords:
    """The records in `workdir`. Raises UserError when no comparison is there."""
    facts = read_object(workdir / 'grid.json')
    if facts is None:
        what = 'holds no comparison (no grid.json)' if workdir.is_dir() else 'is no directory'
        raise UserError(f'{workdir} {what}: name the --workdir of a comparison')
    problems: list[str] = []
    entries = facts.get('arms')
    arms: list[ArmRecords] = []
    for entry in entries if isinstance(entries, list) else []:
        name = entry.get('name') if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _is_directory_name(name):
            problems.append(f'grid.json names an arm that is no directory: {name!r}.')
            continue
        arms.append(_arm(workdir, len(arms), name, entry, _seeds(facts), problems))
    if not arms:
        problems.append('grid.json names no arm.')
    title = facts.get('title') or facts.get('name') or workdir.resolve().name
    baselines = read_baselines(workdir, facts, problems)
    return GridRecords(str(title), facts, arms, problems, baselines)


def _seeds(facts: Line) -> int:
    return int(number(facts, 'seeds') or 0)


def _is_directory_name(name: str) -> bool:
    return name not in ('', '.', '..') and not set('/\\\0') & set(name)


def _arm(
    workdir: Path, index: int, name: str, facts: Line, seeds: int, problems: list[str]
) -> ArmRecords:
    # Seeds beyond the plan are there when the grid was run with more of them before.
    folder = workdir / name
    planned = {seed: folder / f'seed-{seed}' for seed in range(seeds)}
    runs = [_run(path, seed, problems) for seed, path in {**planned, **_seed_dirs(folder)}.items()]
    sweep = [
        _run(path, seed, problems)
        for rate in sorted(_folders(folder, r'lr-(.+)'))
        for seed, path in _seed_dirs(folder / rate).items()
    ]
    again = [_run(path, seed, problems) for seed, path in _seed_dirs(folder / AGAIN).items()]
    return ArmRecords(name, index, facts, runs, sweep, again)


def _seed_dirs(folder: Path) -> dict[int, Path]:
    names = _folders(folder, r'seed-(\d+)')
    return dict(sorted((int(name.removeprefix('seed-')), folder / name) for name in names))


def _folders(folder: Path, pattern: str) -> list[str]:
    if not folder.is_dir():
        return []
    return [x.name for x in folder.iterdir() if re.fullmatch(pattern, x.name) and x.is_dir()]


def _run(path: Path, seed: int, problems: list[str]) -> SeedRun:
    if not (path / 'run.json').exists():
        return SeedRun(seed, _failure(path) or 'not started')
    where = '/'.join(path.parts[-3 if path.parent.name == AGAIN else -2 :])
    try:
        records = read(path)
    except UserError as error:
        problems.append(f'{where}: {error}')
        return SeedRun(seed, 'unreadable')
    problems += [f'{where}: {text}' for text in records.problems]
    try:
        evaluation = read_object(path / EVALUATION) or {}
    except UserError as error:
        problems.append(f'{where}: {error}')
        return SeedRun(seed, 'evaluation unreadable', records)
    state = _state(records, evaluation)
    if state != FINISHED and (failure := _failure(path)):
        state = f'{state}, {failure}'
    texts: dict[str, PerText] = {}
    try:
        texts = per_text.load((path / EVALUATION).with_suffix('.npz')) if evaluation else {}
    except UserError as error:
        problems.append(f'{where}: {error}')
    return SeedRun(seed, state, records, evaluation, texts)


def _failure(path: Path) -> str | None:
    """How a run ended by itself, from the end of its log; None when it did not, or goes on."""
    try:
        with (path / LOG).open('rb') as file:
            file.seek(max(0, (path / LOG).stat().st_size - 8192))
            lines = file.read().decode(errors='replace').split('\n')
    except OSError:
        return None
    said = next((line.strip() for line in reversed(lines) if line.strip()), '')
    # What a command and what Python say last.
    if not re.match(r'error: |[\w.]*(Error|Exception|Interrupt)\b', said):
        return None
    return f'failed: {said.removeprefix("error: ")[:_LONGEST]}'


def _state(records: RunRecords, evaluation: Line) -> str:
    steps, metrics = last(records.train, 'step'), evaluation.get('metrics')
    if metrics == {} and evaluation.get('loss') is None:  # of a rate that was tried
        return f'failed: loss not finite at step {steps or 0:,}'
    if isinstance(metrics, dict):
        return FINISHED
    planned = number(records.facts, 'experiment', 'train', 'steps')
    if steps is None:
        return 'no step taken yet'
    if number(records.train[-1], 'loss') is None:
        return f'failed: loss not finite at step {steps:,}'
    if planned and steps < planned:
        return f'step {steps:,} of {planned:,}'
    return TRAINED

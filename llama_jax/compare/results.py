"""The results of a comparison, from its records alone: results.json and results.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_jax.evaluate import stats
from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.paired import Difference
from llama_jax.report.grid import EXACT, ArmRecords, GridRecords, SeedRun
from llama_jax.report.judged import Judged
from llama_jax.report.read import last
from llama_jax.train.records import write_atomically

AGAIN = 'A/A'


@dataclass(frozen=True)
class Score:
    """A metric of an arm over its seeds."""

    mean: float
    std: float | None
    """Sample standard deviation; None for one seed."""
    n: int
    """Seeds that have it."""
    kind: str
    """'exact', or what else it is: figures of different kinds are not compared."""
    by: str
    """By what kind of likelihood the choices of a task were weighed; '' of other metrics."""


@dataclass(frozen=True)
class Shown:
    """A difference, as evaluate/paired.py judges it; None for what one seed cannot say."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    corrected: float | None
    seeds: int
    texts: int


@dataclass(frozen=True)
class RunResult:
    """One run; None where it is not known or does not apply."""

    arm: str
    seed: int
    learning_rate: float | None
    sweep: bool
    """Whether it is one of a sweep of learning rates, and no part of the means."""
    state: str
    steps: int | None
    tokens: float | None
    flops: float | None
    seconds: float | None
    """Of training, without compilation and evaluation."""
    loss: float | None
    """The arm's own loss on held-out text, at the end."""
    metrics: dict[str, float | None]
    kinds: dict[str, str]
    """Of the metrics that are not exact, and by what choices were weighed where not exactly."""


@dataclass(frozen=True)
class Results:
    """All results of a grid."""

    name: str
    runs: list[RunResult]
    scores: dict[str, dict[str, Score]]
    """Arm to metric to its mean over seeds; what does not apply is not there."""
    differences: dict[str, dict[str, Shown]]
    """Arm to metric to its difference to the first arm; and 'A/A', the first arm under other seeds
    less itself, whose half-width is the noise floor."""


def collect(judged: Judged) -> Results:
    """The results of a grid, whole or not."""
    grid = judged.grid
    scores = {arm.name: _scores(arm) for arm in grid.arms}
    name = str(grid.facts.get('name', grid.title))
    return Results(name, runs(grid), scores, _differences(judged))


def runs(grid: GridRecords) -> list[RunResult]:
    """Every run of the grid and of its sweep."""
    return [
        _run(arm, run, sweep)
        for arm in grid.arms
        for sweep, of in ((False, arm.runs), (True, arm.sweep))
        for run in of
    ]


def write(workdir: Path, results: Results) -> None:
    """Write results.json (means and runs) and results.csv (a row per run)."""
    write_atomically(workdir / 'results.json', json.dumps(asdict(results), indent=1) + '\n')
    text = io.StringIO()
    rows = [_row(run) for run in results.runs]
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(workdir / 'results.csv', text.getvalue())


def _scores(arm: ArmRecords) -> dict[str, Score]:
    scores = {}
    for metric in METRICS:
        values = arm.values(metric)
        if values:
            mean, std = stats.mean_std(values)
            scores[metric] = Score(mean, std, len(values), arm.kind(metric), arm.by(metric))
    return scores


def _kind(arm: ArmRecords, metric: str) -> str:
    by = arm.by(metric)
    return f'by {by}' if by not in ('', EXACT) else arm.kind(metric)


def _differences(judged: Judged) -> dict[str, dict[str, Shown]]:
    found: dict[str, dict[str, Shown]] = {}
    for metric in METRICS:
        every = {**judged.differences(metric), AGAIN: judged.noise(metric)}
        for arm, difference in every.items():
            if difference is not None:
                found.setdefault(arm, {})[metric] = _shown(difference)
    return found


def _shown(found: Difference) -> Shown:
    def known(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return Shown(
        value=found.value,
        low=known(found.low),
        high=known(found.high),
        p=known(found.p),
        corrected=known(found.corrected),
        seeds=found.seeds,
        texts=found.texts,
    )


def _run(arm: ArmRecords, run: SeedRun, sweep: bool) -> RunResult:
    records = run.records
    # A run that ends early, between two lines of training, ends with a validation.
    lines = sorted(records.train + records.validation, key=lambda x: x['step']) if records else []
    steps = last(lines, 'step')
    return RunResult(
        arm=arm.name,
        seed=run.seed,
        learning_rate=run.learning_rate,
        sweep=sweep,
        state=run.state,
        steps=None if steps is None else int(steps),
        tokens=last(lines, 'tokens'),
        flops=last(lines, 'flops'),
        seconds=last(lines, 'seconds'),
        loss=last(records.validation, 'loss') if records else None,
        metrics={name: run.metric(name) for name in METRICS},
        kinds={name: kind for name in METRICS if (kind := _kind(arm, name)) != EXACT},
    )


def _row(run: RunResult) -> dict[str, Any]:
    row = asdict(run)
    metrics, kinds = row.pop('metrics'), row.pop('kinds')
    return {**row, 'kinds': '; '.join(f'{k}={v}' for k, v in kinds.items()), **metrics}

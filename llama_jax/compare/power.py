"""How many seeds a comparison needs, before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_jax.compare.grid import Grid, nearest
from llama_jax.errors import UserError
from llama_jax.evaluate import paired
from llama_jax.evaluate.metrics import METRICS, TASK
from llama_jax.objectives.asked import Reading
from llama_jax.report.grid import read_grid
from llama_jax.report.judged import Judged


def told(grid: Grid, workdir: Path, asked: Sequence[str], sd: float | None) -> Iterator[str]:
    """A line for each METRIC=DIFFERENCE of `asked`, in the units of evaluation.json.

    How much seeds and texts vary is read from the records in `workdir`, those of an earlier
    comparison; or `sd` is the standard deviation of the difference of two runs under one seed.
    """
    if not asked:
        raise UserError(
            '--sd is of --power: give --power METRIC=DIFFERENCE, such as recall_span_10=0.03'
        )
    judged = Judged(read_grid(workdir)) if sd is None else None
    for text in asked:
        metric, _, value = text.partition('=')
        if metric not in METRICS:
            raise UserError(f'--power {text}: no metric {metric!r}: {nearest(metric, [*METRICS])}')
        try:
            difference = float(value)
        except ValueError:
            difference = math.nan
        if not difference > 0 or math.isinf(difference):
            raise UserError(f'--power {text}: the difference is a number above 0')
        arms = _compared(grid, metric)
        variance, rest, source = _spread(judged, metric, sd)
        n = paired.seeds_needed(difference, variance=variance, rest=rest, arms=arms)
        many = 'no number of seeds: more texts' if n is None else f'{n} seeds'
        yield (
            f'{metric}: a difference of {difference:g} is shown by {many} (4 times in 5; {arms} '
            f'{"arms" if arms > 1 else "arm"} against {grid.arms[0].name}; deviation of a pair of '
            f'runs {math.sqrt(variance):.3g}, of the texts {math.sqrt(rest):.3g}, {source})'
        )


_QUESTIONS = {
    'bits_per_byte': 'whole',
    'suffix_bits_per_byte': 'rest',
    'suffix_ordinary_bits_per_byte': 'rest',
    'calibration_error': 'rest',
    'middle_bits_per_byte': 'middle',
    'middle_ordinary_bits_per_byte': 'middle',
    'middle_pseudo_bits_per_byte': 'middle',
    'middle_pseudo_ordinary_bits_per_byte': 'middle',
    'infill_exact': 'infill',
}
"""What an objective has to be asked for a metric."""


def _compared(grid: Grid, metric: str) -> int:
    """How many arms are compared with the first: figures of one kind are, and an arm that cannot be
    asked has none."""
    task = metric.removeprefix(TASK)
    if task != metric and task not in grid.suite.tasks:
        raise UserError(
            f'--power {metric}: the suite of {grid.name} does not ask this task: name it in '
            '--suite.tasks'
        )
    if metric not in _QUESTIONS:
        return max(1, len(grid.arms) - 1)
    base, *kinds = (_kind(arm.experiment.objective.reading, metric) for arm in grid.arms)
    n = kinds.count(base)
    if base is None or (kinds and not n):
        raise UserError(
            f'--power {metric}: no arm of {grid.name} has a figure of it that is of the kind of '
            f'{grid.arms[0].name}: ask for another metric, or name another arm first'
        )
    return max(1, n)


def _kind(reading: Reading, metric: str) -> str | None:
    """Of the figure that an objective has of a metric; None where it has none."""
    if metric == 'infill_exact':
        return None if reading.infill is None else 'written'
    question = getattr(reading, _QUESTIONS[metric])
    if question is None or ('pseudo' in metric) != (question.kind == 'pseudo'):
        return None
    return question.kind


def _spread(judged: Judged | None, metric: str, sd: float | None) -> tuple[float, float, str]:
    """Variance of a pair of runs, what more seeds do not lessen, and where both are from."""
    if sd is not None:
        if not sd > 0 or math.isinf(sd):
            raise UserError(f'--sd {sd:g}: it is a standard deviation, above 0')
        return sd**2, 0.0, 'as given'
    assert judged is not None
    noise = judged.noise(metric)
    variance, _ = paired.seed_variance(judged.comparable(metric))
    source = 'of the paired seeds of earlier runs'
    if math.isnan(variance) and noise is not None and noise.seeds > 1:
        variance, source = noise.se**2 * noise.seeds, 'of the A/A arm of earlier runs'
    if math.isnan(variance):
        raise UserError(
            f'--power {metric}: no two seeds of it in the records of --workdir: give --sd, or the '
            '--workdir of an earlier comparison'
        )
    found = judged.differences(metric).values()
    return variance, max((x.of_texts for x in found if x.seeds > 1), default=0.0), source

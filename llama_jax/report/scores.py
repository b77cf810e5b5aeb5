"""The tables of a comparison's results: means over seeds, differences, baselines, wins."""

from __future__ import annotations

import math

from llama_jax.evaluate import stats
from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.paired import Difference
from llama_jax.report.baselines import Baseline
from llama_jax.report.grid import EXACT, ArmRecords, GridRecords, SeedRun
from llama_jax.report.judged import Judged
from llama_jax.report.read import inside, number
from llama_jax.report.tables import NOT_APPLICABLE, NOT_YET, Cell, Row, Table
from llama_jax.report.units import arrow, spoken, told

HEADLINE = tuple(name for name, about in METRICS.items() if about.headline and about.task)
GEOMETRY = tuple(name for name, about in METRICS.items() if about.headline and not about.task)
OTHERS = tuple(name for name, about in METRICS.items() if not about.headline)

BELOW = '▽'
"""Behind a value that a baseline reaches."""
NOISE = 'noise floor: A/A half-width'


def measured(grid: GridRecords, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Those that some run has, or has as no number; all where nothing was measured yet."""
    found = [run.evaluation.get('metrics') for _, run in grid.runs]
    every = [x for x in found if isinstance(x, dict)]
    named = {name for x in every for name, of in x.items() if inside(of, 'value') is not None}
    return tuple(name for name in metrics if name in named or not every)


def headline(grid: GridRecords) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The common metrics whose best arm, by the means, is above every baseline of it, and the
    others: of them a comparison says how well its arms do what no training is needed for."""
    common = measured(grid, HEADLINE)

    def helped(metric: str) -> bool:
        means = [(mean_std(arm, metric)[0], arm) for arm in grid.arms]
        found = [mean for mean, _ in means if mean is not None]
        best = max(found, key=lambda mean: METRICS[metric].sign * mean, default=None)
        return not found or any(not below(grid, arm, metric) for mean, arm in means if mean == best)

    carried = tuple(metric for metric in common if helped(metric))
    return carried, tuple(metric for metric in common if metric not in carried)


def scores(judged: Judged, metrics: tuple[str, ...]) -> Table:
    """Mean +- standard deviation over seeds, the noise floor, and the baselines below."""
    grid = judged.grid
    rows = [
        Row(
            arm.name,
            [_score(judged, arm, metric) for metric in metrics],
            arm.index,
            not arm.done,
        )
        for arm in grid.arms
    ]
    rows += _noise(judged, metrics)
    rows += [
        Row(baseline.name, [_baseline(baseline, metric) for metric in metrics], beside=True)
        for baseline in grid.baselines
        if any(baseline.value(metric) is not None for metric in metrics)
    ]
    return Table(['arm', *(_head(metric) for metric in metrics)], rows)


def differences(judged: Judged, metrics: tuple[str, ...]) -> Table | None:
    """Every arm less the base on the same seeds and texts, with the corrected interval; None for a
    grid of one arm."""
    base = judged.base
    if base is None or len(judged.grid.arms) < 2:
        return None
    columns = [(metric, judged.differences(metric)) for metric in metrics]
    rows = [
        Row(arm.name, [_difference(m, found, base, arm) for m, found in columns], arm.index)
        for arm in judged.grid.arms[1:]
    ]
    rows += _noise(judged, metrics)
    return Table([f'less {base.name}', *(_head(metric) for metric in metrics)], rows)


def intervals(judged: Judged) -> Table:
    """Every seed by itself, with the bootstrap interval over its examples."""
    grid = judged.grid
    shown = [m for m in METRICS if any(run.metric(m) is not None for _, run in grid.runs)]
    runs = [
        (f'{arm.name}{", again" * again}, seed {run.seed}', arm.index, run)
        for arm in grid.arms
        for again, of in ((False, arm.runs), (True, arm.again))
        for run in of
    ]
    rows = [
        Row(name, [Cell(_interval(run, metric)) for metric in shown], index, not run.done)
        for name, index, run in runs
    ]
    rows += _noise(judged, tuple(shown))
    return Table(['run', *(_head(metric) for metric in shown)], rows)


def wins(grid: GridRecords, metrics: tuple[str, ...] = HEADLINE) -> Table:
    """The share of the tasks that the row's arm wins over the column's, by means over seeds."""
    means = [{metric: mean_std(arm, metric)[0] for metric in metrics} for arm in grid.arms]
    rows = [
        Row(arm.name, [_wins(share) for share in line], arm.index)
        for arm, line in zip(grid.arms, stats.win_matrix(means, tasks(metrics)), strict=True)
    ]
    return Table(['wins of', *(f'over\n{arm.name}' for arm in grid.arms)], rows)


def tasks(metrics: tuple[str, ...]) -> dict[str, dict[str, bool]]:
    """Task to its metrics, and whether higher is better."""
    found: dict[str, dict[str, bool]] = {}
    for name in metrics:
        found.setdefault(METRICS[name].task, {})[name] = METRICS[name].higher_is_better
    return found


def below(grid: GridRecords, arm: ArmRecords, metric: str) -> list[str]:
    """Names of the baselines that the arm's mean does not surpass. Of a bound there are none: what
    it bounds may be above them."""
    mean, _ = mean_std(arm, metric)
    if mean is None or not METRICS[metric].task or arm.kind(metric) in ('bound', 'pseudo'):
        return []
    found = []
    for baseline in grid.baselines:
        value = baseline.value(metric) if baseline.applies(arm.name) else None
        if value is not None and METRICS[metric].sign * (mean - value) <= 0:
            found.append(baseline.name)
    return found


def _wins(share: float | None) -> Cell:
    return Cell('') if share is None else Cell(f'{share:.0%}')


def mean_std(arm: ArmRecords, metric: str) -> tuple[float | None, float | None]:
    """Over the seeds that have the metric; the deviation is None for fewer than two."""
    values = arm.values(metric)
    return stats.mean_std(values) if values else (None, None)


def label_of(metric: str, kind: str, by: str, error: float | None) -> str:
    """Behind a value: what it is where it is no exact likelihood, with the standard `error` of its
    draws, and by what the choices of a task were weighed."""
    draws = '' if error is None else f' (s.e. {told(metric, error, more=1)})'
    of = '' if kind in ('', EXACT) else f' {kind}{draws}'
    return of if by in ('', EXACT) else f'{of} by {by}'


def _monte_carlo(arm: ArmRecords, metric: str) -> float | None:
    """The standard error of the mean over seeds that comes of the draws of a bound alone."""
    found = (number(run.evaluation, 'metrics', metric, 'standard_error') for run in arm.runs)
    errors = [x for x in found if x is not None]
    return math.sqrt(sum(x * x for x in errors)) / len(errors) if errors else None


def _score(judged: Judged, arm: ArmRecords, metric: str) -> Cell:
    mean, std = mean_std(arm, metric)
    if mean is None:
        return Cell(_absent(arm.runs, metric))
    values = arm.values(metric)
    spread = '' if std is None else f' ± {told(metric, std)}'
    of = f' ({len(values)} of {len(arm.runs)})' if len(values) < len(arm.runs) else ''
    label = label_of(metric, arm.kind(metric), arm.by(metric), _monte_carlo(arm, metric))
    under = below(judged.grid, arm, metric)
    text = f'{told(metric, mean)}{spread}{of}{label}{f" {BELOW}" if under else ""}'
    about = f'seeds: {", ".join(told(metric, value, more=2) for value in values)}'
    about += f'; not above {", ".join(under)}' if under else ''
    return Cell(text, arm.name in judged.bold(metric) and not under, about)


def _noise(judged: Judged, metrics: tuple[str, ...]) -> list[Row]:
    """A row, where there is an A/A arm."""
    found = [judged.noise(metric) for metric in metrics]
    if not any(found):
        return []
    cells = [
        Cell(NOT_APPLICABLE if x is None or math.isnan(x.half) else f'± {told(metric, x.half)}')
        for metric, x in zip(metrics, found, strict=True)
    ]
    return [Row(NOISE, cells, beside=True)]


def _baseline(baseline: Baseline, metric: str) -> Cell:
    value = baseline.value(metric)
    return Cell(NOT_APPLICABLE if value is None else told(metric, value))


def _difference(
    metric: str, differences: dict[str, Difference], base: ArmRecords, arm: ArmRecords
) -> Cell:
    found = differences.get(arm.name)
    if found is None:
        absent = [_absent(of.runs, metric) for of in (base, arm) if not of.values(metric)]
        return Cell(NOT_YET if NOT_YET in absent else NOT_APPLICABLE)
    value = told(metric, found.value, sign=True)
    label = label_of(metric, arm.kind(metric), arm.by(metric), None)  # as the base's
    if math.isnan(found.half):
        return Cell(f'{value}{label}', told='one seed: no interval')
    low, high = (told(metric, x, sign=True) for x in (found.low, found.high))
    about = f'{_counted(found.seeds, "seed")}, {_counted(found.texts, "text")}'
    if math.isnan(found.p):
        about += '; of other texts, not of other seeds'
    else:
        about += f'; p {found.p:.2g}, corrected {found.corrected:.2g}'
    return Cell(f'{value} [{low}, {high}]{label}', found.shown, about)


def _counted(n: int, what: str) -> str:
    return f'{n} {what}{"s" * (n != 1)}'


def _absent(runs: list[SeedRun], metric: str) -> str:
    """Why a metric has no value: it does not apply, it is not finite, or it is not yet measured."""
    found = [inside(run.evaluation, 'metrics', metric) for run in runs]
    values = [x['value'] for x in found if isinstance(x, dict) and 'value' in x]
    if not values:
        return NOT_YET
    return NOT_APPLICABLE if None in values else 'not finite'


def _interval(run: SeedRun, metric: str) -> str:
    value = run.metric(metric)
    if value is None:
        return _absent([run], metric)
    low, high, error = (
        number(run.evaluation, 'metrics', metric, x) for x in ('low', 'high', 'standard_error')
    )
    label = label_of(metric, run.kind(metric), run.by(metric), error)
    if low is None or high is None:
        return f'{told(metric, value)}{label}'
    return f'{told(metric, value)} [{told(metric, low)}, {told(metric, high)}]{label}'


def _head(metric: str) -> str:
    label, unit = spoken(metric)
    return f'{label}\n{unit} {arrow(metric)}'

"""The tables of a comparison's results: means over seeds, intervals, wins."""

from __future__ import annotations

from llama_jax.evaluate import stats
from llama_jax.evaluate.metrics import METRICS
from llama_jax.report.grid import ArmRecords, GridRecords, SeedRun
from llama_jax.report.read import inside, number
from llama_jax.report.tables import NOT_APPLICABLE, NOT_YET, Cell, Row, Table
from llama_jax.report.units import arrow, spoken, told

HEADLINE = tuple(name for name, about in METRICS.items() if about.headline)
OTHERS = tuple(name for name, about in METRICS.items() if not about.headline)


def others(grid: GridRecords) -> Table:
    """The metrics that some arms do not have; those that no evaluation names are left out."""
    metrics = [run.evaluation.get('metrics') for _, run in grid.runs]
    named = {name for x in metrics if isinstance(x, dict) for name in x}
    return scores(grid, tuple(name for name in OTHERS if name in named) or OTHERS)


def scores(grid: GridRecords, metrics: tuple[str, ...]) -> Table:
    """Mean +- standard deviation over seeds; in bold what is within two sigma of the best."""
    columns = [_column(grid, metric) for metric in metrics]
    rows = [
        Row(arm.name, [column[arm.index] for column in columns], arm.index, not arm.done)
        for arm in grid.arms
    ]
    return Table(['arm', *(_head(metric) for metric in metrics)], rows)


def intervals(grid: GridRecords) -> Table:
    """Every seed by itself, with the bootstrap interval over its examples."""
    shown = [m for m in METRICS if any(run.metric(m) is not None for _, run in grid.runs)]
    rows = [
        Row(
            f'{arm.name}, seed {run.seed}',
            [Cell(_interval(run, metric)) for metric in shown],
            arm.index,
            not run.done,
        )
        for arm, run in grid.runs
    ]
    return Table(['run', *(_head(metric) for metric in shown)], rows)


def wins(grid: GridRecords) -> Table:
    """The share of the common metrics in which the row's arm is better than the column's.

    Means over seeds are compared; a tie counts half.
    """
    means = [{metric: mean_std(arm, metric)[0] for metric in HEADLINE} for arm in grid.arms]
    matrix = stats.win_matrix(means, {m: METRICS[m].higher_is_better for m in HEADLINE})
    rows = [
        Row(arm.name, [_wins(share) for share in line], arm.index)
        for arm, line in zip(grid.arms, matrix, strict=True)
    ]
    return Table(['wins of', *(f'over\n{arm.name}' for arm in grid.arms)], rows)


def _wins(share: float | None) -> Cell:
    return Cell('') if share is None else Cell(f'{share:.0%}', best=share > 0.5)


def _column(grid: GridRecords, metric: str) -> list[Cell]:
    found = [mean_std(arm, metric) for arm in grid.arms]
    means, stds = zip(*found, strict=True) if found else ((), ())
    best = stats.bold(means, stds, higher_is_better=METRICS[metric].higher_is_better)
    return [_score(arm, metric, bold) for arm, bold in zip(grid.arms, best, strict=True)]


def mean_std(arm: ArmRecords, metric: str) -> tuple[float | None, float | None]:
    """Over the seeds that have the metric; the deviation is None for fewer than two."""
    values = arm.values(metric)
    return stats.mean_std(values) if values else (None, None)


def _score(arm: ArmRecords, metric: str, best: bool) -> Cell:
    mean, std = mean_std(arm, metric)
    if mean is None:
        return Cell(_absent(arm.runs, metric))
    values = arm.values(metric)
    spread = '' if std is None else f' ± {told(metric, std)}'
    of = f' ({len(values)} of {len(arm.runs)})' if len(values) < len(arm.runs) else ''
    seeds = ', '.join(told(metric, value, more=2) for value in values)
    return Cell(f'{told(metric, mean)}{spread}{of}', best, f'seeds: {seeds}')


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
    low, high = (number(run.evaluation, 'metrics', metric, side) for side in ('low', 'high'))
    if low is None or high is None:
        return told(metric, value)
    return f'{told(metric, value)} [{told(metric, low)}, {told(metric, high)}]'


def _head(metric: str) -> str:
    label, unit = spoken(metric)
    return f'{label}\n{unit} {arrow(metric)}'

"""The pictures of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace

from llama_jax.evaluate.metrics import CURVES, METRICS
from llama_jax.report.curves import series
from llama_jax.report.grid import EXACT, ArmRecords, GridRecords, SeedRun
from llama_jax.report.picture import Axis, Curve, Picture, Point, running_median
from llama_jax.report.read import Line, RunRecords, inside, last, number
from llama_jax.report.style import arm_style
from llama_jax.report.units import arrow, factor, spoken

LIKELIHOODS = ('bits_per_byte', 'suffix_bits_per_byte')
_PATH_DOTS = 40
"""Most points of a curve on which dots still help."""


Section = tuple[str, str, list[Picture]]
"""Heading, what to know when reading it, pictures that have something to show."""


def sections(grid: GridRecords) -> list[Section]:
    """All pictures of the report under their headings."""
    found = [
        (
            'Common metrics during training',
            'Measured the same way for every arm. '
            'Thin lines are seeds, the thick line is their mean.',
            [_common(grid, metric, x) for metric in CURVES for x in ('tokens', 'flops')],
        ),
        (
            'Ranks during training',
            'The place of each arm by the mean of its seeds: where lines cross, the end of the '
            'schedule decides, not the way there.',
            [_ranks(grid, 'recall_span_1', _light), _ranks(grid, 'bits_per_byte', _exact)],
        ),
        (
            'Own loss',
            'Each arm is drawn with the loss that it minimises: the levels of different '
            'objectives are not comparable, the shapes are. '
            'Thin lines are seeds, the thick line is their mean.',
            [
                _loss(grid, kind, x)
                for kind in ('train', 'validation')
                for x in ('tokens', 'flops', 'seconds')
            ],
        ),
        (
            'Likelihood against representation',
            'Small dots are seeds, large dots their means with one standard deviation. A dotted '
            'line is an arm without this likelihood, at its mean.',
            [
                _pareto(grid, likelihood, metric)
                for likelihood in LIKELIHOODS
                for metric in ('probe_accuracy', 'recall_span_1')
            ],
        ),
        (
            'Geometry and layers',
            '',
            [_path(grid), _layers(grid)],
        ),
        (
            'Learning-rate sensitivity',
            "Each arm at the learning rates of the sweep and at its own, under the sweep's seeds.",
            [_rates_loss(grid), _rates_metric(grid)],
        ),
    ]
    shown = [(title, note, [p for p in pictures if not p.empty]) for title, note, pictures in found]
    return [section for section in shown if section[2]]


def _axis(x: str) -> Axis:
    if x == 'flops':
        return Axis('training FLOPs, logarithmic', log=True)
    return Axis('training time, seconds' if x == 'seconds' else 'tokens')


def _loss(grid: GridRecords, kind: str, x: str) -> Picture:
    def points(run: RunRecords) -> list[Point]:
        found = series(getattr(run, kind), x, 'loss')
        return running_median(found, len(found) // 40) if kind == 'train' and found else found

    held_out = kind == 'validation'
    return Picture(
        f'loss-{"held-out" if held_out else "training"}-{x}',
        'Own loss, held out' if held_out else 'Own loss, training',
        'as each objective defines it',
        _axis(x),
        _by_arm(grid, points),
        whole=False,
    )


def _common(grid: GridRecords, metric: str, x: str) -> Picture:
    title, unit = titled(metric)
    return Picture(
        f'{metric.replace("_", "-")}-{x}',
        title,
        unit,
        _axis(x),
        _by_arm(grid, lambda run: _scaled(series(run.light, x, metric), metric)),
    )


def _light(run: RunRecords) -> list[Line]:
    return run.light


def _exact(run: RunRecords) -> list[Line]:
    """Validations whose likelihood is one, and no bound."""
    return [line for line in run.validation if line.get('likelihood', EXACT) == EXACT]


def _ranks(grid: GridRecords, metric: str, lines: Callable[[RunRecords], list[Line]]) -> Picture:
    means: dict[str, dict[float, float]] = {}
    for arm in grid.arms:
        of_seeds = [series(lines(run.records), 'tokens', metric) for run in arm.runs if run.records]
        points = _mean([points for points in of_seeds if points])
        means[arm.name] = {x: y for x, y in points if y is not None}
    # A rank is one among all that have the metric: where arms differ in steps, or one failed, only
    # the places that all of them have are compared.
    measured = [set(of) for of in means.values() if of]
    shared = set.intersection(*measured) if len(measured) > 1 else set()
    means = {name: {x: y for x, y in of.items() if x in shared} for name, of in means.items()}
    sign = -METRICS[metric].sign
    curves = []
    for arm in grid.arms:
        points = [
            # Arms that are level share a place.
            (x, float(sum(sign * of[x] < sign * y for of in means.values() if x in of)))
            for x, y in means[arm.name].items()
        ]
        curves.append(Curve(arm.name, points, arm_style(arm.index), dots=True))
    label = titled(metric)[0]
    names = [str(i + 1) for i in range(len(grid.arms))]
    return Picture(
        f'ranks-{metric.replace("_", "-")}',
        f'Rank by {label[0].lower()}{label[1:]}',
        'first above',
        Axis('tokens'),
        curves,
        rows=names if len(names) > 1 else (),
    )


def _by_arm(grid: GridRecords, points: Callable[[RunRecords], list[Point]]) -> list[Curve]:
    """Thin curves of seeds below, thick ones of their means above."""
    thin: list[Curve] = []
    thick: list[Curve] = []
    for arm in grid.arms:
        of_seeds = [points(run.records) for run in arm.runs if run.records]
        curves = _with_mean(arm, [p for p in of_seeds if p])
        thin, thick = thin + curves[:-1], thick + curves[-1:]
    return thin + thick


def _with_mean(arm: ArmRecords, of_seeds: list[list[Point]]) -> list[Curve]:
    """The seeds, and last their mean where all of them have a point; a single seed is its mean."""
    style = arm_style(arm.index)
    thin = [Curve('', points, f'{style} seed') for points in of_seeds]
    mean = _mean(of_seeds)
    if not mean:
        return [replace(c, label=arm.name) if i + 1 == len(thin) else c for i, c in enumerate(thin)]
    curve = Curve(arm.name, mean, f'{style} mean', dots=len(mean) == 1)
    return [*(thin if len(thin) > 1 else []), curve]


def _mean(of_seeds: list[list[Point]]) -> list[Point]:
    if not of_seeds:
        return []
    tables = [dict(points) for points in of_seeds]
    xs = [x for x in tables[0] if all(x in table for table in tables)]
    return [(x, mean_or_none([table[x] for table in tables])) for x in xs]


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean; None when one of the values is not there."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return statistics.fmean(known)


def _pareto(grid: GridRecords, x_metric: str, y_metric: str) -> Picture:
    x_title, x_unit = titled(x_metric)
    y_title, y_unit = titled(y_metric)
    clouds: list[Curve] = []
    means: list[Curve] = []
    without: list[tuple[ArmRecords, float]] = []
    best: list[Point] = []
    for arm in grid.arms:
        style = arm_style(arm.index)
        pairs = [(run.metric(x_metric), run.metric(y_metric)) for run in arm.runs]
        points = [
            (factor(x_metric) * x, factor(y_metric) * y)
            for x, y in pairs
            if x is not None and y is not None
        ]
        if points:
            xs, ys = zip(*points, strict=True)
            x, y = statistics.fmean(xs), statistics.fmean(ys)
            if arm.kind(x_metric) == arm.kind(y_metric) == EXACT:  # a bound is no figure to rank by
                best.append((x, y))
            kinds = {arm.kind(x_metric), arm.kind(y_metric)} - {EXACT}
            label = f'{arm.name} ({", ".join(sorted(kinds))})' if kinds else arm.name
            means.append(Curve(label, [(x, y)], f'{style} mean cloud', line=False))
        if len(points) > 1:
            dx, dy = statistics.stdev(xs), statistics.stdev(ys)
            cross = [(x - dx, y), (x + dx, y), (x, None), (x, y - dy), (x, y + dy)]
            clouds.append(Curve('', cross, f'{style} spread'))
            clouds.append(Curve('', points, f'{style} seed', line=False))
        elif not points and not any(run.applies(x_metric) for run in arm.runs):
            levels = [factor(y_metric) * y for y in arm.values(y_metric)]
            without += [(arm, statistics.fmean(levels))] if levels else []
    ends = [x for c in (*clouds, *means) for x, _ in c.points]
    absent = [
        Curve(arm.name, [(min(ends), y), (max(ends), y)], f'{arm_style(arm.index)} absent')
        for arm, y in without
        if ends
    ]
    front = _front(best, METRICS[x_metric].higher_is_better, METRICS[y_metric].higher_is_better)
    curves = [Curve('Pareto front', front, 'front')] if len(front) > 1 else []
    return Picture(
        f'pareto-{x_metric}-{y_metric}'.replace('_', '-'),
        y_title,
        y_unit,
        Axis(f'{x_title}{f", {x_unit}" if x_unit else ""}', tight=True),
        [*curves, *absent, *clouds, *means] if means else [],
    )


def _front(points: list[Point], x_up: bool, y_up: bool) -> list[Point]:
    """Those points than which no other is as good in both and better in one, in order of x."""

    def beats(a: Point, b: Point) -> bool:
        xs = (a[0] - b[0]) * (1 if x_up else -1)
        ys = ((a[1] or 0.0) - (b[1] or 0.0)) * (1 if y_up else -1)
        return xs >= 0 and ys >= 0 and (xs > 0 or ys > 0)

    return sorted(p for p in points if not any(beats(other, p) for other in points))


def _path(grid: GridRecords) -> Picture:
    """Alignment over uniformity: where the representations go during the training."""
    curves: list[Curve] = []
    for arm in grid.arms:
        style = arm_style(arm.index)
        runs = [
            series(run.records.light, 'uniformity', 'alignment') for run in arm.runs if run.records
        ]
        runs = [[p for p in points if p[1] is not None] for points in runs]
        for points in filter(None, runs):
            dots = len(points) <= _PATH_DOTS
            curves.append(Curve('', points, f'{style} seed step', dots=dots))
        ends = [points[-1] for points in runs if points]
        if ends:
            curves.append(Curve(arm.name, ends, f'{style} mean cloud', line=False))
    return Picture(
        'alignment-uniformity',
        'Alignment and uniformity over training',
        f'alignment {arrow("alignment")}',
        Axis(f'uniformity {arrow("uniformity")}', tight=True),
        curves,
        note='Down and to the left is better; the large dot is the end of a run.',
    )


def _layers(grid: GridRecords) -> Picture:
    curves: list[Curve] = []
    for arm in grid.arms:
        of_seeds = [_probes(run) for run in arm.runs]
        curves += _with_mean(arm, [points for points in of_seeds if points])
    return Picture(
        'probe-layers',
        'Probe accuracy by layer',
        titled('probe_accuracy')[1],
        Axis('layer (0 is the embedding)'),
        sorted(curves, key=lambda c: 'mean' in c.style.split()),
    )


def _probes(run: SeedRun) -> list[Point]:
    values = inside(run.evaluation, 'layers', 'probe')
    if not isinstance(values, list):
        return []
    points = [(float(i), number({'x': x}, 'x')) for i, x in enumerate(values)]
    return _scaled(points, 'probe_accuracy')


def _rates(
    grid: GridRecords, value: Callable[[SeedRun], float | None]
) -> list[tuple[ArmRecords, list[Point]]]:
    """For each arm that was swept, the value at each rate: the mean over the sweep's seeds."""
    found: list[tuple[ArmRecords, list[Point]]] = []
    for arm in grid.arms:
        at: dict[float, list[float]] = {}
        seeds = {run.seed for run in arm.sweep}
        for run in [*arm.sweep, *(run for run in arm.runs if run.seed in seeds)]:
            x, y = run.learning_rate, value(run)
            if run.trained and x is not None and y is not None:
                at.setdefault(x, []).append(y)
        found.append((arm, [(x, statistics.fmean(at[x])) for x in sorted(at)]))
    return found


def _rates_loss(grid: GridRecords) -> Picture:
    curves = []
    for arm, points in _rates(grid, _final_loss):
        ys = [y for _, y in points if y is not None]
        above = [(x, y - min(ys)) for x, y in points if y is not None]
        curves.append(Curve(arm.name, above, arm_style(arm.index), dots=True))
    return Picture(
        'learning-rate-loss',
        'Own loss by learning rate',
        'above the best of the arm',
        Axis('peak learning rate, logarithmic', log=True, tight=True),
        curves,
        whole=False,
    )


def _rates_metric(grid: GridRecords) -> Picture:
    metric = 'recall_span_1'
    title, unit = titled(metric)
    return Picture(
        'learning-rate-recall',
        f'{title} by learning rate',
        unit,
        Axis('peak learning rate, logarithmic', log=True, tight=True),
        [
            Curve(arm.name, _scaled(points, metric), arm_style(arm.index), dots=True)
            for arm, points in _rates(grid, _final_recall)
        ],
    )


def _final_loss(run: SeedRun) -> float | None:
    """Of the held-out text where it was measured, else of the last training record."""
    if not run.records:
        return None
    lines: list[Line] = run.records.validation or run.records.train
    return last(lines[-1:], 'loss')


def _final_recall(run: SeedRun) -> float | None:
    value = run.metric('recall_span_1')
    return last(run.records.light, 'recall_span_1') if value is None and run.records else value


def titled(metric: str) -> tuple[str, str]:
    """Label, and unit with the arrow of the better direction."""
    label, unit = spoken(metric)
    return label, f'{unit} {arrow(metric)}'.strip()


def _scaled(points: list[Point], metric: str) -> list[Point]:
    """The points with y in the unit that is shown."""
    return [(x, None if y is None else factor(metric) * y) for x, y in points]

"""The charts of a run."""

from __future__ import annotations

from llama_jax.report.draw import htmls
from llama_jax.report.picture import Axis, Curve, Picture, Point, Rule, running_median
from llama_jax.report.read import Line, RunRecords, last, number

BASELINES = (('xz', 'xz -9'), ('zlib_per_document', 'zlib -9'))
"""Fields of baselines.json and their names on the page."""


def learning(run: RunRecords) -> str:
    """Loss and bits per byte, against tokens and against FLOPs."""
    flops = [x for x, _ in series(run.train, 'flops', 'loss') if x > 0]
    # Within one run FLOPs are tokens times a constant: factors show another view of the curve.
    axes = {
        'tokens': tokens(run),
        'flops': Axis(
            'training FLOPs, logarithmic',
            start=min(flops, default=None),
            end=max(flops, default=None),
            log=True,
        ),
    }
    return htmls(
        figure(run, axis, x) for figure in (_loss, _bits_per_byte) for x, axis in axes.items()
    )


def training(run: RunRecords) -> str:
    """Learning rate and gradient norm against tokens, speed and waiting against time."""
    seconds = [number(line, 'seconds') for line in run.train]
    size, unit = _unit_of_time(max((s for s in seconds if s is not None), default=0.0))
    time = Axis(f'training time, {unit}')
    rates = Curve('', series(run.train, 'tokens', 'learning_rate'), 'trend')
    norms = smoothed(series(run.train, 'tokens', 'grad_norm'))
    speeds = series(run.train, 'seconds', 'tokens_per_second')
    percent = (0.0, 10.0)  # what is next to nothing looks so
    return htmls(
        Picture(
            title.lower().replace(' ', '-'),
            title,
            told,
            axis,
            curves,
            whole=False,
            include=include,
            missing='No training step recorded yet.',
        )
        for title, told, axis, curves, include in (
            ('Learning rate', 'of the update after each step', tokens(run), [rates], (0.0,)),
            ('Gradient norm', 'before clipping', tokens(run), norms, (0.0,)),
            (
                'Speed',
                'tokens per second',
                time,
                smoothed([(x / size, y) for x, y in speeds]),
                (0.0,),
            ),
            (
                'Waiting for data',
                'percent of the time between records',
                time,
                smoothed(_share_waiting(run.train, size)),
                percent,
            ),
        )
    )


def tokens(run: RunRecords) -> Axis:
    """The axis of all charts against tokens."""
    return Axis('tokens', end=last(run.train, 'tokens'))


def _loss(run: RunRecords, axis: Axis, x: str) -> Picture:
    held_out = series(run.validation, x, 'loss')
    return Picture(
        f'loss-{x}',
        'Loss',
        'nats per token',
        axis,
        [
            *smoothed(series(run.train, x, 'loss'), 'training'),
            Curve('validation', held_out, 'held-out', dots=len(held_out) <= 60),
        ],
        whole=False,
        missing='No training step recorded yet.',
    )


def _bits_per_byte(run: RunRecords, axis: Axis, x: str) -> Picture:
    points = series(run.validation, x, 'bits_per_byte')
    baselines = ((field, label, number(run.baselines, field)) for field, label in BASELINES)
    return Picture(
        f'bits-per-byte-{x}',
        'Validation',
        run.likelihood_unit,
        axis,
        [Curve('model', points, 'held-out', dots=len(points) <= 60)],
        whole=False,
        rules=[
            Rule(label, value, field.split('_')[0])
            for field, label, value in baselines
            if value is not None
        ],
        missing='No validation with bits per byte recorded yet.',
    )


def series(lines: list[Line], x: str, y: str) -> list[Point]:
    """Points (x, y) of the lines that have x; y is None where it is not finite.

    Empty when no line has the field y at all.
    """
    found = [(number(line, x), number(line, y)) for line in lines if y in line]
    return [(a, b) for a, b in found if a is not None]


def smoothed(points: list[Point], label: str = '') -> list[Curve]:
    """Curves of the points, and of their running median once there are enough of them."""
    reach = len(points) // 40
    if not reach:
        return [Curve(label, points, 'trend')]
    median = Curve(
        f'{label}, median of {2 * reach + 1} records'.removeprefix(', '),
        running_median(points, reach),
        'trend',
    )
    return [Curve(label or 'each record', points, 'raw'), median]


def _share_waiting(train: list[Line], size: float) -> list[Point]:
    """Percent of the seconds since the record before, against time in units of `size` seconds."""
    points: list[Point] = []
    before = 0.0
    for line in train:
        seconds, waiting = number(line, 'seconds'), number(line, 'seconds_waiting')
        if seconds is None:
            continue
        if waiting is not None and seconds > before:
            points.append((seconds / size, 100 * waiting / (seconds - before)))
        before = seconds
    return points


def _unit_of_time(seconds: float) -> tuple[float, str]:
    for size, unit in ((86400.0, 'days'), (3600.0, 'hours'), (60.0, 'minutes')):
        if seconds >= 2 * size:
            return size, unit
    return 1.0, 'seconds'

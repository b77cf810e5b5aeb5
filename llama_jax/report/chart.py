"""Line charts that follow the width and the colours of the page.

The curves are an SVG stretched over the plot; all lettering is HTML beside it, so that it keeps its
size on a telephone.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_jax.report.text import escape, power_of_ten, significant, tick_labels

Point = tuple[float, float | None]
"""x, and y or None where y is not finite."""
_SIDE = 1000
_MOST_POINTS = 800
"""More than a chart has pixels; keeps the page small after a long run."""


@dataclass(frozen=True)
class Curve:
    """Points in order of x. `style` is a class of the style sheet."""

    label: str
    points: Sequence[Point]
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Rule:
    """A horizontal line to compare with."""

    label: str
    value: float
    style: str


@dataclass(frozen=True)
class Axis:
    """What x is. `log` is for quantities that grow by factors."""

    label: str
    end: float | None = None
    """The largest x of the frame where it is not that of the points."""
    start: float | None = None
    """The smallest, where it is neither that of the points (log) nor 0."""
    log: bool = False


def chart(
    title: str,
    unit: str,
    axis: Axis,
    curves: Sequence[Curve],
    *,
    rules: Sequence[Rule] = (),
    include: Sequence[float] = (),
    missing: str = 'Nothing recorded yet.',
) -> str:
    """A figure in HTML.

    The frame holds the points, the rules and the values `include`; points far above all others are
    cut off, and the caption says so.
    """
    curves = [
        Curve(c.label, [p for p in c.points if p[0] > 0 or not axis.log], c.style, c.dots)
        for c in curves
    ]
    if any(c.points for c in curves):
        missing = 'No finite value recorded.'
    curves = [c for c in curves if any(y is not None for _, y in c.points)]
    head = f'<figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span></figcaption>'
    if not curves:
        return f'<figure>{head}<p class="missing">{escape(missing)}</p></figure>'

    xs = [x for c in curves for x, _ in c.points]
    low, high, hidden = _range_y(curves, [*include, *(r.value for r in rules)])
    notes = f'<p class="note">{hidden} points above the frame are not shown.</p>' if hidden else ''
    left, right = min(xs) if axis.log else min([0.0, *xs]), max(xs)
    left = left if axis.start is None else min(left, axis.start)
    right = right if axis.end is None else max(right, axis.end)
    if left == right:
        left, right = (left / 2, right * 2) if axis.log else (left - 1, right + 1)

    def at_x(x: float) -> float:
        if axis.log:
            return math.log(x / left) / math.log(right / left)
        return (x - left) / (right - left)

    def at_y(y: float) -> float:
        return 1 - (y - low) / (high - low)

    y_ticks = ticks(low, high)
    x_ticks = log_ticks(left, right) if axis.log else ticks(left, right, most=5)
    y_labels = tick_labels(y_ticks)
    x_labels = list(map(power_of_ten, x_ticks)) if axis.log else tick_labels(x_ticks)
    svg = [f'<path class="grid" d="{_horizontals([at_y(y) for y in y_ticks])}"/>']
    svg += [f'<path class="rule {r.style}" d="{_horizontals([at_y(r.value)])}"/>' for r in rules]
    for c in curves:
        svg += _draw(c, at_x, at_y)
    highest = max((r.value for r in rules), default=0)
    lettering = [
        *(
            f'<i class="y" style="top:{_percent(at_y(y))}">{label}</i>'
            for y, label in zip(y_ticks, y_labels, strict=True)
        ),
        *(
            f'<i class="x" style="left:{_percent(at_x(x))}">{label}</i>'
            for x, label in zip(x_ticks, x_labels, strict=True)
        ),
        *(
            f'<i class="name {r.style} {"above" if r.value == highest else "below"}" '
            f'style="top:{_percent(at_y(r.value))}">{escape(r.label)} {r.value:.3f}</i>'
            for r in rules
        ),
    ]
    keys = ''.join(
        f'<span class="key {c.style}">{escape(c.label)}</span>' for c in curves if c.label
    )
    return (
        f'<figure>{head}<div class="keys">{keys}</div>'
        f'<div class="plot"><svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(title)}, {escape(unit)}, against {escape(axis.label)}">'
        f'{"".join(svg)}</svg>{"".join(lettering)}</div>'
        f'<p class="axis">{escape(axis.label)}</p>{notes}</figure>'
    )


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` of them."""
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10, 20) if m * unit >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with some of their multiples where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5)):
        finer = [m * 10.0**p for p in powers for m in mantissas if low <= m * 10.0**p <= high]
        if found and len(finer) > 4:
            break
        found = finer
    return found[:: math.ceil(len(found) / 5)] if found else [low, high]


def running_median(points: Sequence[Point], reach: int) -> list[Point]:
    """Medians over up to `reach` neighbours on either side.

    Near the first point as few after as before, so that a steep beginning is not smoothed away.
    A median, for a mean would carry one spike to all its neighbours. Of a long run some points are
    taken, at equal distances and at equal factors. Points without y count for nothing and stay so.
    """
    every = math.ceil(2 * len(points) / _MOST_POINTS)
    last = len(points) - 1
    factors = (int(last**share) for share in (i / 200 for i in range(200)))
    medians: list[Point] = []
    for i in sorted({*range(0, last, every), *factors, last}):
        x, y = points[i]
        r = min(reach, i)
        around = [y for _, y in points[i - r : i + r + 1] if y is not None]
        medians.append((x, None if y is None else statistics.median(around)))
    return medians


def thin(points: Sequence[Point], at_x: Callable[[float], float]) -> list[Point]:
    """The lowest and the highest point of each of 400 stretches of the axis.

    A stretch without y stays as one such point.
    `at_x` gives the place of x on the axis, 0 to 1.
    """
    if len(points) <= _MOST_POINTS:
        return list(points)
    kept: list[Point] = []
    for _, group in itertools.groupby(points, key=lambda p: int(at_x(p[0]) * _MOST_POINTS / 2)):
        part = list(group)
        finite = [(y, j) for j, (_, y) in enumerate(part) if y is not None]
        kept += [part[j] for j in sorted({min(finite)[1], max(finite)[1]})] if finite else part[:1]
    return kept


def _range_y(curves: Sequence[Curve], include: Sequence[float]) -> tuple[float, float, int]:
    """Lowest and highest y of the frame, and the number of points above it."""
    ys = sorted(y for c in curves for _, y in c.points if y is not None)
    # A spike must not flatten all the rest; where the curves begin is no spike.
    starts = [next(y for _, y in c.points if y is not None) for c in curves]
    usual = max(ys[int(0.98 * (len(ys) - 1))], *starts)
    top = ys[-1] if ys[-1] <= 2 * max(usual, 0) else usual
    bounds = [ys[0], top, *include]
    low, high = min(bounds), max(bounds)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    margin = 0.06 * (high - low)
    hidden = sum(y > high + margin for y in ys)
    return low if low == 0 else low - margin, high + margin, hidden


def _draw(
    curve: Curve, at_x: Callable[[float], float], at_y: Callable[[float], float]
) -> list[str]:
    points = thin(curve.points, at_x)
    path: list[str] = []
    pen = 'M'
    for x, y in points:
        if y is not None:
            # h0, a line of no length, shows a point whose neighbours are not finite.
            path.append(f'{pen}{_unit(at_x(x))} {_unit(at_y(y))}{"h0" if pen == "M" else ""}')
        pen = 'M' if y is None else 'L'
    drawn = [f'<path class="{curve.style}" d="{"".join(path)}"/>']
    # With its round cap it is a dot, too, which is not stretched with the drawing.
    if curve.dots or len(path) == 1:
        drawn += [
            f'<path class="dot {curve.style}" d="M{_unit(at_x(x))} {_unit(at_y(y))}h0">'
            f'<title>{escape(curve.label)} {significant(y, 4)}</title></path>'
            for x, y in points
            if y is not None
        ]
    return drawn


def _horizontals(ys: Sequence[float]) -> str:
    return ''.join(f'M0 {_unit(y)}H{_SIDE}' for y in ys)


def _unit(share: float) -> str:
    return f'{_SIDE * share:.1f}'.removesuffix('.0')


def _percent(share: float) -> str:
    return f'{100 * share:.2f}%'

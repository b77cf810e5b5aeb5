"""Line charts that follow the width and the colours of the page.

The curves are an SVG stretched over the plot; all lettering is HTML beside it, so that it keeps its
size on a telephone.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llama_jax.report.text import escape, power_of_ten, significant, tick_labels

Point = tuple[float, float | None]
"""x, and y or None where y is not finite."""
_SIDE = 1000
_MOST_POINTS = 800
"""More than a chart has pixels; keeps the page small after a long run."""


@dataclass(frozen=True)
class Curve:
    """Points joined in their order. `style` is one or more classes of the style sheet."""

    label: str
    """Its name in the legend; empty for a curve that the legend leaves out."""
    points: Sequence[Point]
    style: str
    dots: bool = False
    line: bool = True
    """False for a cloud of points, which no line joins."""


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
    tight: bool = False
    """The frame ends where the points do, and need not hold 0."""


@dataclass(frozen=True)
class Frame:
    """What a chart shows of the plane."""

    left: float
    right: float
    low: float
    high: float
    log: bool
    """Whether x is."""
    hidden: int
    """Points above the frame."""
    x_ticks: list[float]
    y_ticks: list[float]

    def at_x(self, x: float) -> float:
        """Place of x, 0 on the left to 1 on the right."""
        if self.log:
            return math.log(x / self.left) / math.log(self.right / self.left)
        return (x - self.left) / (self.right - self.left)

    def at_y(self, y: float) -> float:
        """Place of y, 0 at the top to 1 at the bottom."""
        return 1 - (y - self.low) / (self.high - self.low)


def on_axis(axis: Axis, curves: Sequence[Curve]) -> list[Curve]:
    """The curves without the points that have no place on the axis."""
    return [replace(c, points=[p for p in c.points if p[0] > 0 or not axis.log]) for c in curves]


def frame_of(axis: Axis, curves: Sequence[Curve], include: Sequence[float] = ()) -> Frame:
    """The frame around `curves`, each of which has a finite point, and the values `include`."""
    xs = [x for c in curves for x, _ in c.points]
    left, right = _range_x(axis, xs)
    low, high, hidden = _range_y(curves, include)
    x_ticks = log_ticks(left, right) if axis.log else ticks(left, right, most=5)
    if all(float(x).is_integer() for x in xs):  # layers and other counts
        x_ticks = [x for x in x_ticks if axis.log or x.is_integer()]
    return Frame(left, right, low, high, axis.log, hidden, x_ticks, ticks(low, high))


def chart(
    title: str,
    unit: str,
    axis: Axis,
    curves: Sequence[Curve],
    *,
    rules: Sequence[Rule] = (),
    include: Sequence[float] = (),
    missing: str = 'Nothing recorded yet.',
    note: str = '',
) -> str:
    """A figure in HTML.

    The frame holds the points, the rules and the values `include`; points far above all others are
    cut off, and the caption says so. `note` stands below the axis.
    """
    curves = on_axis(axis, curves)
    if any(c.points for c in curves):
        missing = 'No finite value recorded.'
    curves = [c for c in curves if any(y is not None for _, y in c.points)]
    head = f'<figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span></figcaption>'
    if not curves:
        return f'<figure>{head}<p class="missing">{escape(missing)}</p></figure>'

    frame = frame_of(axis, curves, [*include, *(r.value for r in rules)])
    told = [note] * bool(note)
    told += [f'{frame.hidden} points above the frame are not shown.'] * bool(frame.hidden)
    notes = ''.join(f'<p class="note">{escape(text)}</p>' for text in told)

    at_x, at_y = frame.at_x, frame.at_y
    y_ticks, x_ticks = frame.y_ticks, frame.x_ticks
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
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        finer = [m * 10.0**p for p in powers for m in mantissas if low <= m * 10.0**p <= high]
        if len(found) > 1 and (len(finer) > 4 or len(mantissas) > 3):
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


def _range_x(axis: Axis, xs: Sequence[float]) -> tuple[float, float]:
    """Ends of the x axis."""
    left, right = min(xs), max(xs)
    if axis.tight:
        share = 0.04
        if axis.log:
            factor = (right / left) ** share
            left, right = left / factor, right * factor
        else:
            left, right = left - share * (right - left), right + share * (right - left)
    elif not axis.log:
        left = min(0.0, left)
    left = left if axis.start is None else min(left, axis.start)
    right = right if axis.end is None else max(right, axis.end)
    if left == right:
        return (left / 2, right * 2) if axis.log else (left - 1, right + 1)
    return left, right


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
    drawn = [f'<path class="{curve.style}" d="{"".join(path)}"/>'] if curve.line else []
    # With its round cap it is a dot, too, which is not stretched with the drawing.
    if curve.dots or not curve.line or len(path) == 1:
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

"""What a picture shows, apart from how it is drawn (report/draw.py)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

Point = tuple[float, float | None]
"""x, and y or None where y is not finite."""
_MOST_POINTS = 800
"""More than a picture has pixels; keeps the page small after a long run."""


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
class Picture:
    """One figure. `name` is that of its file."""

    name: str
    title: str
    unit: str
    axis: Axis
    curves: Sequence[Curve]
    whole: bool = True
    """False for losses, where a spike may be cut off."""
    rules: Sequence[Rule] = ()
    include: Sequence[float] = ()
    """Values that the frame must hold."""
    rows: Sequence[str] = ()
    """Names of the rows, top down, where y is the number of a row."""
    band: float = 0.0
    """Half-width of a shaded band around x = 0; with rows."""
    line: float | None = None
    """x of a vertical line."""
    missing: str = 'Nothing recorded yet.'
    note: str = ''

    @property
    def shown(self) -> list[Curve]:
        """The curves that have a finite point with a place on the axis, without other points."""
        placed = [
            replace(c, points=[p for p in c.points if p[0] > 0 or not self.axis.log])
            for c in self.curves
        ]
        return [c for c in placed if any(y is not None for _, y in c.points)]

    @property
    def empty(self) -> bool:
        return not self.shown

    @property
    def frame_x(self) -> tuple[float, float]:
        """Ends of the x axis."""
        axis = self.axis
        xs = [x for c in self.shown for x, _ in c.points]
        if self.band and not axis.log:
            xs += [self.band, -self.band]
        if self.line is not None:
            xs.append(self.line)
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

    @property
    def frame_y(self) -> tuple[float, float, int]:
        """Lowest and highest y of the frame, and the number of points above it."""
        if self.rows:
            return len(self.rows) - 0.5, -0.5, 0
        curves = self.shown
        ys = sorted(y for c in curves for _, y in c.points if y is not None)
        include = [*self.include, *(rule.value for rule in self.rules)]
        include += ys[-1:] * self.whole
        # A spike must not flatten all the rest; where the curves begin is no spike.
        starts = [next(y for _, y in c.points if y is not None) for c in curves]
        usual = max(ys[int(0.98 * (len(ys) - 1))], *starts)
        top = ys[-1] if ys[-1] <= 2 * max(usual, 0) else usual
        low, high = min([ys[0], *include]), max([top, *include])
        if low == high:
            low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
        margin = 0.06 * (high - low)
        hidden = sum(y > high + margin for y in ys)
        return low if low == 0 else low - margin, high + margin, hidden


def running_median(points: Sequence[Point], reach: int) -> list[Point]:
    """Medians over up to `reach` neighbours on either side.

    Near the first point as few after as before, so that a steep beginning is not smoothed away.
    A median, for a mean would carry one spike to all its neighbours. Of a long run some points are
    taken, at equal distances and at equal factors. Points without y count for nothing and stay so.
    """
    every = math.ceil(2 * len(points) / _MOST_POINTS)
    last = len(points) - 1
    factors = (min(last, int(last**share)) for share in (i / 200 for i in range(200)))
    medians: list[Point] = []
    for i in sorted({*range(0, last, every), *factors, last}):
        x, y = points[i]
        r = min(reach, i)
        around = [y for _, y in points[i - r : i + r + 1] if y is not None]
        medians.append((x, None if y is None else statistics.median(around)))
    return medians

"""Pictures of what a comparison shows: the noise floor, and differences with their intervals."""

from __future__ import annotations

import math

from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.paired import Difference
from llama_jax.report.judged import Judged
from llama_jax.report.picture import Axis, Curve, Picture
from llama_jax.report.pictures import titled
from llama_jax.report.scores import label_of
from llama_jax.report.style import arm_style
from llama_jax.report.units import factor, spoken


def one_a_task(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Of each task the last metric, and what is of none: enough for a picture."""
    last = {METRICS[name].task or name: name for name in metrics}
    return tuple(last.values())


def floor(judged: Judged, metrics: tuple[str, ...]) -> Picture:
    """How large the differences are, in units of the A/A half-width."""
    shown: list[str] = []
    points: dict[str, list[tuple[float, float | None]]] = {}
    for metric in metrics:
        noise = judged.noise(metric)
        if noise is None or not noise.half > 0:
            continue
        found = judged.differences(metric)
        for name, difference in found.items():
            place = abs(difference.value) / noise.half
            points.setdefault(name, []).append((place, float(len(shown))))
        if found:
            shown.append(spoken(metric)[0])
    return Picture(
        'noise-floor',
        'Differences over the noise floor',
        '',
        Axis('difference to the first arm / A/A half-width, logarithmic', log=True, tight=True),
        [
            Curve(arm.name, points[arm.name], f'{arm_style(arm.index)} mean cloud', line=False)
            for arm in judged.grid.arms
            if arm.name in points
        ],
        rows=shown,
        line=1.0,
        note='Left of the line a difference may be seeds and texts alone.',
    )


def forest(judged: Judged, metric: str) -> Picture:
    """The difference of each arm to the base, with its interval."""
    found = judged.differences(metric)
    arms = [arm for arm in judged.grid.arms if arm.name in found]
    curves = []
    for row, arm in enumerate(arms):
        difference, style = found[arm.name], arm_style(arm.index)
        value, ends = _scaled(metric, difference)
        curves += [
            Curve('', [(x, float(row)) for x in ends], style),
            Curve('', [(value, float(row))], f'{style} mean cloud', line=False),
        ]
    noise = judged.noise(metric)
    half = noise.half if noise is not None and math.isfinite(noise.half) else 0.0
    base = judged.base.name if judged.base else ''
    label, unit = titled(metric)
    if judged.base:
        what = label_of(metric, judged.base.kind(metric), judged.base.by(metric), None)
        unit += f',{what}' if what else ''
    band = ' The band is the noise floor: A/A half-width.' if half else ''
    return Picture(
        f'difference-{metric.replace("_", "-")}',
        label,
        unit,
        Axis(f'less {base}, corrected interval', tight=True),
        curves,
        rows=[arm.name for arm in arms],
        band=factor(metric) * half,
        line=0.0,
        note=f'{"" if METRICS[metric].higher_is_better else "Left is better."}{band}'.strip(),
    )


def _scaled(metric: str, found: Difference) -> tuple[float, list[float]]:
    ends = [] if math.isnan(found.half) else [found.low, found.high]
    return factor(metric) * found.value, [factor(metric) * x for x in ends]

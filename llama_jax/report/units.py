"""Metrics as people read them: shares in percent, arrows for the better direction."""

from __future__ import annotations

from llama_jax.evaluate.metrics import METRICS


def factor(metric: str) -> float:
    """What a value of `metric` is multiplied by to be shown."""
    return 100.0 if METRICS[metric].unit == 'share' else 1.0


def told(metric: str, value: float, *, more: int = 0, sign: bool = False) -> str:
    """A value of `metric`, or a deviation of it, with `more` decimals than a table has; with its
    sign where it is a difference."""
    scaled = factor(metric)
    text = f'{scaled * value:{"+" if sign else ""}.{(1 if scaled == 100 else 3) + more}f}'
    return text.replace('-', '−')


def spoken(metric: str) -> tuple[str, str]:
    """Label and unit."""
    about = METRICS[metric]
    label = about.label[:1].upper() + about.label[1:]
    return label, '%' if about.unit == 'share' else about.unit


def arrow(metric: str) -> str:
    """The better direction."""
    return '↑' if METRICS[metric].higher_is_better else '↓'

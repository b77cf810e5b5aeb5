"""Grids over sizes, tokens and FLOPs: each is a comparison of sizes at equal tokens, or of sizes
and objectives at equal FLOPs, and together they tell scaling laws (docs/scaling.md).

    for grid in scaling_160k scaling_330k scaling_660k scaling_2e12 scaling_4e12; do
        python -m experiments.compare $grid --workdir runs/$grid
    done
    python -m experiments.scaling runs/scaling_*
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from configs.objectives import _arm, _small
from llama_jax.compare.budget import match_flops
from llama_jax.compare.grid import Arm, Grid
from llama_jax.evaluate.suite import Suite
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.train.experiment import Experiment

WIDTHS = (32, 64, 128, 192)
"""Of the backbone; 109 thousand to 2 million parameters, the embedding included."""


def _of(steps: int) -> Experiment:
    """`steps` steps of 4,096 tokens. The schedule ends where the run does."""
    base = _small()
    schedule = replace(base.optimizer.schedule, warmup_steps=steps // 10)
    return replace(
        base,
        train=replace(base.train, steps=steps),
        optimizer=replace(base.optimizer, schedule=schedule),
        evaluation=replace(base.evaluation, every=steps),
        checkpoint=replace(base.checkpoint, every=steps),
    )


def _wide(width: int, base: Experiment, name: str = 'width', **changes: object) -> Arm:
    model = replace(base.model, dim=width, head_dim=width // 4, ffn=width * 5 // 2)
    return _arm(f'{name}-{width}', base, model=model, **changes)


def _grid(name: str, title: str, arms: Sequence[Arm], may_differ: tuple[str, ...]) -> Grid:
    return Grid(
        name=name,
        title=title,
        arms=tuple(arms),
        seeds=2,
        # A law is of likelihood: nothing is spent on what else is measured.
        suite=Suite(topics=0, order=0, pairs='', pool=0, windows=256),
        may_differ=('name', 'model', *may_differ),
    )


def _sizes(name: str, title: str, steps: int) -> Grid:
    """Every width at `steps` steps."""
    base = _of(steps)
    return _grid(name, title, [_wide(width, base) for width in WIDTHS], ())


def _at_flops(name: str, title: str, steps: int) -> Grid:
    """Every width, with one head and with two, at the FLOPs of `steps` steps of the second."""
    base = _of(steps)
    # The first arm is what the others are matched to.
    arms = [_wide(width, base) for width in (WIDTHS[1], WIDTHS[0], *WIDTHS[2:])]
    arms += [_wide(w, base, 'heads', objective=MultiToken(heads=2)) for w in WIDTHS]
    return match_flops(_grid(name, title, arms, ('objective',)))


def scaling_160k() -> Grid:
    """Four sizes at 164 thousand tokens.

    Launch: python -m experiments.compare scaling_160k --workdir runs/scaling_160k
    Expected: the smaller models do not fall behind: there is too little text for the larger ones.
    """
    return _sizes('scaling_160k', 'Four sizes at 164 thousand tokens', 40)


def scaling_330k() -> Grid:
    """Four sizes at 328 thousand tokens.

    Launch: python -m experiments.compare scaling_330k --workdir runs/scaling_330k
    Expected: between those of half and of twice as many tokens.
    """
    return _sizes('scaling_330k', 'Four sizes at 328 thousand tokens', 80)


def scaling_660k() -> Grid:
    """Four sizes at 655 thousand tokens.

    Launch: python -m experiments.compare scaling_660k --workdir runs/scaling_660k
    Expected: the best size is larger than at fewer tokens.
    """
    return _sizes('scaling_660k', 'Four sizes at 655 thousand tokens', 160)


def scaling_2e12() -> Grid:
    """Four sizes, with one head and with two, at 2e12 FLOPs.

    Launch: python -m experiments.compare scaling_2e12 --workdir runs/scaling_2e12
    Expected: the lowest point of the parabola lies within the sizes, at fewer parameters than at
    twice the FLOPs; a second head costs more than it gives (Gloeckle et al. 2024: multi-token
    prediction helps larger models).
    """
    return _at_flops('scaling_2e12', 'Four sizes, one head and two, at 2e12 FLOPs', 220)


def scaling_4e12() -> Grid:
    """The same at 4e12 FLOPs.

    Launch: python -m experiments.compare scaling_4e12 --workdir runs/scaling_4e12
    Expected: the best size is larger than at 2e12 FLOPs.
    """
    return _at_flops('scaling_4e12', 'Four sizes, one head and two, at 4e12 FLOPs', 440)

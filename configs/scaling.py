"""Grids over sizes and tokens: each is a comparison of sizes at equal tokens, and together they
tell a scaling law (docs/scaling.md).

    for grid in scaling_160k scaling_330k scaling_660k; do
        python -m experiments.compare $grid --workdir runs/$grid
    done
    python -m experiments.scaling runs/scaling_*
"""

from __future__ import annotations

from dataclasses import replace

from configs.objectives import _arm, _small
from llama_jax.compare.grid import Grid
from llama_jax.evaluate.suite import Suite

WIDTHS = (32, 64, 128, 192)
"""Of the backbone; 70 thousand to 2 million parameters, the embedding included."""


def _sizes(name: str, title: str, steps: int) -> Grid:
    """Every width at `steps` steps of 4,096 tokens. The schedule ends where the run does."""
    base = _small()
    schedule = replace(base.optimizer.schedule, warmup_steps=steps // 10)
    base = replace(
        base,
        train=replace(base.train, steps=steps),
        optimizer=replace(base.optimizer, schedule=schedule),
        evaluation=replace(base.evaluation, every=steps),
        checkpoint=replace(base.checkpoint, every=steps),
    )
    arms = []
    for width in WIDTHS:
        model = replace(base.model, dim=width, head_dim=width // 4, ffn=width * 5 // 2)
        arms.append(_arm(f'width-{width}', base, model=model))
    return Grid(
        name=name,
        title=title,
        arms=tuple(arms),
        seeds=2,
        # A law is of likelihood: little is spent on what else is measured.
        suite=Suite(
            pairs='', order=60, pool=64, windows=256, steps=20, rates=(1e-3,), tuned_seeds=1
        ),
        may_differ=('name', 'model'),
        again=False,
        baselines=False,
    )


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

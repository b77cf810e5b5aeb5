"""`--optimizer muon`: an optimizer by its name, which a command line of nested settings cannot
choose; `--optimizer.beta 0.9` sets what it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.named_option import kinds, refuse_unknown, taken
from llama_jax.optim import REGISTRY
from llama_jax.optim.base import OptimizerConfig

if TYPE_CHECKING:
    from llama_jax.compare.grid import Grid

OPTION = '--optimizer'


def from_command_line(
    arguments: Sequence[str], optimizer: OptimizerConfig
) -> tuple[OptimizerConfig, list[str]]:
    """`optimizer`, or the one that the option names where it is another, and the other arguments.

    Another keeps what all have: schedule, weight decay, clipping. Raises UserError for a name that
    is not known, and for settings that the chosen one does not have.
    """
    others, named = taken(arguments, OPTION)
    if named is not None:
        (kind,) = kinds(named, OPTION, REGISTRY)
        optimizer = chosen(optimizer, kind)
    refuse_unknown(others, OPTION, type(optimizer), REGISTRY, uses='trains with')
    return optimizer, others


def chosen(optimizer: OptimizerConfig, kind: type[OptimizerConfig]) -> OptimizerConfig:
    """`optimizer` where it is of that kind, or one of it with what all have in common."""
    if type(optimizer) is kind:
        return optimizer
    shared = (field.name for field in dataclasses.fields(OptimizerConfig))
    return kind(**{name: getattr(optimizer, name) for name in shared})


def of_grid(arguments: Sequence[str], grid: Grid) -> tuple[Grid, list[str]]:
    """The grid whose arms have the optimizer that the option names, each with the rate it had.
    Without the option they have their own, which need not be the same."""
    optimizer, others = from_command_line(arguments, grid.arms[0].experiment.optimizer)
    if taken(arguments, OPTION)[1] is None:
        return grid, others
    arms = []
    for arm in grid.arms:
        own = chosen(arm.experiment.optimizer, type(optimizer))
        experiment = dataclasses.replace(arm.experiment, optimizer=own)
        arms.append(dataclasses.replace(arm, experiment=experiment))
    return dataclasses.replace(grid, arms=tuple(arms), tuned=''), others


def listing() -> str:
    """The names, for the help."""
    return f'{OPTION} NAME is one of {", ".join(REGISTRY)}'

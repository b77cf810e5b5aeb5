"""`--optimizer muon`: an optimizer by its name, which a command line of nested settings cannot
choose; `--optimizer.beta 0.9` sets what it has."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_jax.errors import UserError
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
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition('=')
        if option == OPTION:
            optimizer = chosen(optimizer, _kind(value if equals else next(rest, '')))
        else:
            others.append(argument)
    _refuse_unknown(others, type(optimizer))
    return optimizer, others


def chosen(optimizer: OptimizerConfig, kind: type[OptimizerConfig]) -> OptimizerConfig:
    """`optimizer` where it is of that kind, or one of it with what all have in common."""
    if type(optimizer) is kind:
        return optimizer
    shared = (field.name for field in dataclasses.fields(OptimizerConfig))
    return kind(**{name: getattr(optimizer, name) for name in shared})


def of_grid(arguments: Sequence[str], grid: Grid) -> tuple[Grid, list[str]]:
    """The grid whose arms have the optimizer that the option names, each with the rate it had."""
    first = grid.arms[0].experiment.optimizer
    optimizer, others = from_command_line(arguments, first)
    arms = []
    for arm in grid.arms:
        own = chosen(arm.experiment.optimizer, type(optimizer))
        experiment = dataclasses.replace(arm.experiment, optimizer=own)
        arms.append(dataclasses.replace(arm, experiment=experiment))
    return dataclasses.replace(grid, arms=tuple(arms)), others


def listing() -> str:
    """The names, for the help."""
    return f'{OPTION} NAME is one of {", ".join(REGISTRY)}'


def _kind(name: str) -> type[OptimizerConfig]:
    found = REGISTRY.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), REGISTRY, n=1)
        meant = f'did you mean {near[0]}? ' if near else ''
        raise UserError(f'{OPTION} {name}: {meant}there are {", ".join(REGISTRY)}')
    return found


def _refuse_unknown(arguments: Sequence[str], kind: type[OptimizerConfig]) -> None:
    own = {field.name for field in dataclasses.fields(kind)}
    name = next(name for name, known in REGISTRY.items() if known is kind)
    for argument in arguments:
        option, _, setting = argument.partition('=')[0].partition('.')
        setting = setting.partition('.')[0].replace('-', '_')
        if option != OPTION or not setting or setting in own:
            continue
        has = [
            other
            for other, known in REGISTRY.items()
            if setting in {field.name for field in dataclasses.fields(known)}
        ]
        if has:
            raise UserError(
                f'{argument.partition("=")[0]} is a setting of {", ".join(has)}, and this trains '
                f'with {name}: give {OPTION} {has[0]} too, or leave it out'
            )

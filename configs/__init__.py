"""Named experiments: every public function of these modules that takes nothing and returns an
Experiment; and named comparisons. A variant is a function of your own that calls
`dataclasses.replace` on one of them, here or in a file of your own (`path/to/mine.py:NAME`)."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from configs import finetune, llama, own, quickstart
from llama_jax.errors import UserError
from llama_jax.train.experiment import Experiment

if TYPE_CHECKING:
    from llama_jax.compare.grid import Grid

_MODULES = (quickstart, llama)


def named() -> dict[str, Callable[[], Experiment]]:
    """Every named experiment."""
    return {name: f for module in _MODULES for name, f in _functions(module).items()}


def get(name: str) -> Experiment:
    """The experiment called `name`, or that of `path/to/mine.py:NAME`. Raises UserError with the
    nearest name when there is none."""
    if own.is_file(name):
        return own.recorded(own.load(name, Experiment), name)
    return _found(named(), name, 'configuration')()


def recipes() -> dict[str, Callable[[], Experiment]]:
    """Every named recipe of a fine-tuning: experiments whose model is what they begin with."""
    return _functions(finetune)


def recipe(name: str) -> Experiment:
    """The recipe called `name`, like `get`."""
    return get(name) if own.is_file(name) else _found(recipes(), name, 'recipe')()


def grids() -> dict[str, Callable[[], Grid]]:
    """Every named comparison: the same for a Grid."""
    from configs import directions, objectives, scaling  # here: they load what no other run needs

    modules = (objectives, directions, scaling)
    return {name: f for module in modules for name, f in _functions(module).items()}


def grid(name: str) -> Grid:
    """The comparison called `name`, like `get`."""
    if own.is_file(name):
        from llama_jax.compare.grid import Grid

        grid = own.load(name, Grid)
        return replace(
            grid,
            arms=tuple(
                replace(arm, experiment=own.recorded(arm.experiment, f'{name}, arm {arm.name}'))
                for arm in grid.arms
            ),
        )
    return _found(grids(), name, 'grid')()


def _functions(module: ModuleType) -> dict[str, Callable[[], Any]]:
    """The public functions of a module that take nothing."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith('_')
        and not inspect.signature(function).parameters
    }


def _found(functions: dict[str, Callable[[], Any]], name: str, what: str) -> Callable[[], Any]:
    if name not in functions:
        near = difflib.get_close_matches(name, functions, n=1)
        hint = (
            f'did you mean {near[0]!r}?'
            if near
            else 'see --list for all names, or give mine.py:NAME'
        )
        raise UserError(f'no {what} is called {name!r}: {hint}')
    return functions[name]

"""Named experiments: every public function of these modules that takes nothing and returns an
Experiment. A variant is a function of your own that calls `dataclasses.replace` on one of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from configs import llama, quickstart
from llama_jax.errors import UserError
from llama_jax.train.experiment import Experiment

_MODULES = (quickstart, llama)


def named() -> dict[str, Callable[[], Experiment]]:
    """Every named experiment."""
    found = {}
    for module in _MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            public = function.__module__ == module.__name__ and not name.startswith('_')
            if public and not inspect.signature(function).parameters:
                found[name] = function
    return found


def get(name: str) -> Experiment:
    """The experiment called `name`. Raises UserError with the nearest name when there is none."""
    experiments = named()
    if name not in experiments:
        near = difflib.get_close_matches(name, experiments, n=1)
        hint = f'did you mean {near[0]!r}?' if near else 'see --list for all names'
        raise UserError(f'no configuration is called {name!r}: {hint}')
    return experiments[name]()

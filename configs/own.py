"""A configuration in a file of one's own: `path/to/mine.py:experiment`."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import types
from typing import TypeVar

from llama_jax.errors import UserError
from llama_jax.objectives import contract
from llama_jax.paths import local
from llama_jax.train.config_file import ConfigFile, executed, told
from llama_jax.train.experiment import Experiment, from_dict, to_dict

Kind = TypeVar('Kind')

_FORM = 'path/to/mine.py:NAME'
_FOR = {'Experiment': 'pretrain, finetune, prepare and plan', 'Grid': 'compare and plan'}


def is_file(name: str) -> bool:
    """Whether a name means a file of Python, and not a configuration by its name."""
    return _file_and_name(name) is not None


def _file_and_name(name: str) -> re.Match[str] | None:
    return re.fullmatch(r'(.*?\.py)(?::(.*))?', name, re.DOTALL)


def config_file(name: str) -> ConfigFile | None:
    """The file of `PATH.py:NAME`, as it is now; None for a configuration by its name.

    Raises UserError where it cannot be read.
    """
    parts = _file_and_name(name)
    if parts is None:
        return None
    file = local(parts[1], 'the configuration')
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(f'the configuration {file} cannot be read: {error.strerror}') from None
    return ConfigFile(file, parts[2] or '', source)


def load(name: str, kind: type[Kind]) -> Kind:
    """What the function of `PATH.py:NAME` returns, or the value of that name.

    Raises UserError, with the line in that file where there is one, for whatever is not a `kind`.
    """
    file = config_file(name)
    assert file is not None, name
    path = file.path
    module = executed(file)
    found = getattr(module, file.name, None) if file.name else None
    if found is None:
        raise UserError(f'{path} {_missing(module, file.name)}')
    if inspect.isfunction(found):
        needed = [
            parameter.name
            for parameter in inspect.signature(found).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if needed:
            raise UserError(
                f'{file} takes {", ".join(needed)}: a configuration is a function that takes '
                'nothing; give defaults'
            )
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise UserError(told(error, path)) from error
    if not isinstance(found, kind):
        other = type(found).__name__
        use = f'; {other} is for {_FOR[other]}' if other in _FOR else ''
        raise UserError(f'{file} gives {other}, where {kind.__name__} is wanted{use}')
    return found


def recorded(experiment: Experiment, name: str) -> Experiment:
    """The experiment as a run of it would read it back. Raises UserError for what no record can
    hold, before anything is trained."""
    try:
        contract.check(experiment.objective)
    except UserError as error:
        raise UserError(f'{name}: {error} (docs/adding_an_objective.md)') from error
    try:
        plain = json.loads(json.dumps(to_dict(experiment)))
        again = from_dict(plain)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(
            f'{name} cannot be written down, so that no run could go on: {error}'
        ) from error
    return again


def _missing(module: types.ModuleType, name: str) -> str:
    """What to say where a file has no such name, or none is given."""
    names = [
        known
        for known, value in vars(module).items()
        if not known.startswith('_')
        and getattr(value, '__module__', None) == module.__name__
        and inspect.isfunction(value)
    ]
    there = f'there are {", ".join(names)}' if names else 'there is no function in it'
    if not name:
        return f'has no name behind it: give {_FORM}; {there}'
    near = difflib.get_close_matches(name, names, n=1)
    return f'has no {name!r}: {f"did you mean {near[0]!r}?" if near else there}'

"""`--objective masked`: an objective by its name, which a command line of nested settings cannot
choose; `--objective.rate 0.3` sets what it has."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Sequence
from typing import Any

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from experiments.named_option import kinds, name_of, refuse_unknown, taken
from llama_jax.errors import UserError
from llama_jax.objectives import REGISTRY
from llama_jax.objectives.base import Objective

OPTION = '--objective'
_SEVERAL = tuple[Objective, ...]


def by_default() -> ConstructorRegistry:
    """For tyro: where the type is the protocol, an objective has the settings of its default."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def settings(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type is not Objective or not dataclasses.is_dataclass(info.default):
            return None
        own = StructTypeInfo.make(type(info.default), info.default, info.in_union_context)
        found: Any = ConstructorRegistry.get_struct_spec(own)
        return found

    return registry


def from_command_line(arguments: Sequence[str], objective: Any) -> tuple[Any, list[str]]:
    """`objective`, or the one that the option names where it is another, and the other arguments.

    Settings that are objectives themselves are given by name as well (`--objective.parts causal
    masked`), and so are chosen here. Raises UserError for a name that is not known, for settings
    that the chosen one does not have, and where one that has no default is not given.
    """
    others, named = taken(arguments, OPTION)
    if named is not None:
        (kind,) = kinds(named, OPTION, REGISTRY)
        objective = objective if type(objective) is kind else kind
    kind = objective if isinstance(objective, type) else type(objective)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    refuse_unknown(others, OPTION, kind, REGISTRY)
    given: dict[str, Any] = {}
    for name in fields:
        option = f'{OPTION}.{name.replace("_", "-")}'
        if hints[name] in (Objective, _SEVERAL):
            others, names = taken(others, option)
            if names is not None:
                most = 1 if hints[name] is Objective else 0
                made = tuple(
                    _made(part, option) for part in kinds(names, option, REGISTRY, most=most)
                )
                given[name] = made if hints[name] == _SEVERAL else made[0]
        elif isinstance(objective, type) and _needed(fields[name]):
            if hints[name] is not str:
                raise UserError(
                    f'{OPTION} {name_of(kind, REGISTRY)} is written in a file: {_BY_FILE}'
                )
            _, words = taken(others, option)
            if words:  # tyro sets it again
                given[name] = words[0]
    if not isinstance(objective, type):
        return (dataclasses.replace(objective, **given) if given else objective), others
    missing = [n for n, field in fields.items() if _needed(field) and n not in given]
    if missing:
        listed = ' and '.join(f'{OPTION}.{n.replace("_", "-")}' for n in missing)
        raise UserError(f'{OPTION} {name_of(kind, REGISTRY)} needs {listed} too')
    return kind(**given), others


_BY_FILE = 'a configuration of your own, mine.py:NAME (docs/training.md)'


def refuse(arguments: Sequence[str]) -> None:
    """Raise UserError for the option where arms of a grid are what is compared."""
    for argument in arguments:
        if argument.partition('=')[0].partition('.')[0] == OPTION:
            raise UserError(
                f'{argument}: the objectives of the arms are what a grid compares; leave it out, '
                'choose arms with --only, or write a grid with the arm (docs/objectives.md)'
            )


def listing() -> str:
    """The names, each with what its file says of it, for the help."""
    width = max(map(len, REGISTRY))
    lines = [f'  {name:{width}}  {_about(kind)}' for name, kind in REGISTRY.items()]
    return f'{OPTION} NAME is one of\n' + '\n'.join(lines)


def _about(kind: type) -> str:
    """The first paragraph of its file, in one line."""
    return ' '.join((sys.modules[kind.__module__].__doc__ or '').split('\n\n')[0].split())


def _made(kind: type[Any], option: str) -> Any:
    needed = [field.name for field in dataclasses.fields(kind) if _needed(field)]
    if needed:
        raise UserError(
            f'{option} {name_of(kind, REGISTRY)}: it needs {" and ".join(needed)}, which are '
            f'written in {_BY_FILE}'
        )
    return kind()


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING

"""`--objective masked`: an objective by its name, which a command line of nested settings cannot
choose; `--objective.rate 0.3` sets what it has."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Sequence
from typing import Any

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

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
    others, named = _taken(list(arguments), OPTION)
    if named is not None:
        (kind,) = _kinds(named, OPTION, 1)
        objective = objective if type(objective) is kind else kind
    kind = objective if isinstance(objective, type) else type(objective)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _refuse_unknown(others, kind, fields)
    given: dict[str, Any] = {}
    for name in fields:
        option = f'{OPTION}.{name.replace("_", "-")}'
        if hints[name] in (Objective, _SEVERAL):
            others, names = _taken(others, option)
            if names is not None:
                most = 1 if hints[name] is Objective else 0
                made = tuple(_made(part, option) for part in _kinds(names, option, most))
                given[name] = made if hints[name] == _SEVERAL else made[0]
        elif isinstance(objective, type) and _needed(fields[name]):
            if hints[name] is not str:
                raise UserError(f'{OPTION} {_name(kind)} is written in a file: {_BY_FILE}')
            _, words = _taken(others, option)
            if words:  # tyro sets it again
                given[name] = words[0]
    if not isinstance(objective, type):
        return (dataclasses.replace(objective, **given) if given else objective), others
    missing = [n for n, field in fields.items() if _needed(field) and n not in given]
    if missing:
        listed = ' and '.join(f'{OPTION}.{n.replace("_", "-")}' for n in missing)
        raise UserError(f'{OPTION} {_name(kind)} needs {listed} too')
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


def _taken(arguments: list[str], option: str) -> tuple[list[str], list[str] | None]:
    """The arguments without an option, and the words that follow it; None where it is not there."""
    others: list[str] = []
    words: list[str] | None = None
    taking = False
    for argument in arguments:
        if argument.startswith('--'):
            name, equals, value = argument.partition('=')
            taking = name.replace('_', '-') == option
            if taking:
                words = [value] if equals else []
                continue
        if taking and words is not None:
            words.append(argument)
        else:
            others.append(argument)
    return others, words


def _kinds(names: Sequence[str], option: str, most: int) -> list[type[Any]]:
    """The classes of the registry that are named, one or more, at most `most` (0: any number)."""
    if not names or most and len(names) > most:
        asked = 'one name' if most == 1 else 'names'
        raise UserError(f'{option} {" ".join(names)}: give {asked} of {", ".join(REGISTRY)}')
    by_word = {
        word: name for name, kind in REGISTRY.items() for word in (kind.__name__.lower(), name)
    }
    found = []
    for word in names:
        key = word.lower().replace('_', '-')
        if key not in by_word:
            near = difflib.get_close_matches(key, by_word, n=1)
            meant = f'did you mean {by_word[near[0]]}? ' if near else ''
            raise UserError(f'{option} {word}: {meant}there are {", ".join(REGISTRY)}')
        found.append(REGISTRY[by_word[key]])
    return found


def _made(kind: type[Any], option: str) -> Any:
    needed = [field.name for field in dataclasses.fields(kind) if _needed(field)]
    if needed:
        raise UserError(
            f'{option} {_name(kind)}: it needs {" and ".join(needed)}, which are written in '
            f'{_BY_FILE}'
        )
    return kind()


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _name(kind: type[Any]) -> str:
    return next((name for name, known in REGISTRY.items() if known is kind), kind.__name__)


def _refuse_unknown(arguments: Sequence[str], kind: type[Any], own: dict[str, Any]) -> None:
    """Raise UserError for a setting that the objective does not have."""
    for argument in arguments:
        option, _, setting = argument.partition('=')[0].partition('.')
        setting = setting.partition('.')[0].replace('-', '_')
        if option != OPTION or not setting or setting in own:
            continue
        shown = argument.partition('=')[0]
        near = difflib.get_close_matches(setting, own, n=1)
        has = [
            name
            for name, other in REGISTRY.items()
            if setting in {field.name for field in dataclasses.fields(other)}
        ]
        if has and not near:
            raise UserError(
                f'{shown} is a setting of {", ".join(has)}, and this trains {_name(kind)}: give '
                f'{OPTION} {has[0]} too, or leave it out'
            )
        meant = f'did you mean {OPTION}.{near[0].replace("_", "-")}? ' if near else ''
        known = ', '.join(name.replace('_', '-') for name in own) or 'no settings'
        raise UserError(f'there is no option {shown}: {meant}{_name(kind)} has {known}')

"""Options that name a class, which a command line of nested settings cannot choose: `--tune LoRA`,
`--objective masked`, `--optimizer muon`. `--objective.rate 0.3` sets what the class has."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.errors import UserError

Registry = Mapping[str, type[Any]]
"""Name -> dataclass: what an option can name."""


def taken(arguments: Sequence[str], option: str) -> tuple[list[str], list[str] | None]:
    """The arguments without an option, and the words that follow it; None where it is not there."""
    others: list[str] = []
    words: list[str] | None = None
    taking = False
    for argument in arguments:
        if argument.startswith('-'):
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


def kinds(
    names: Sequence[str], option: str, registry: Registry, *, most: int = 1
) -> list[type[Any]]:
    """The classes that are named, one or more, at most `most` (0: any number). Raises UserError for
    a name that is not known."""
    if not names or most and len(names) > most:
        asked = 'one name' if most == 1 else 'names'
        raise UserError(f'{option} {" ".join(names)}: give {asked} of {", ".join(registry)}')
    by_word = {kind.__name__.lower(): name for name, kind in registry.items()}
    by_word |= {_key(name): name for name in registry}
    found = []
    for word in names:
        if _key(word) not in by_word:
            near = difflib.get_close_matches(_key(word), by_word, n=1)
            meant = f'did you mean {by_word[near[0]]}? ' if near else ''
            raise UserError(f'{option} {word}: {meant}there are {", ".join(registry)}')
        found.append(registry[by_word[_key(word)]])
    return found


def _key(name: str) -> str:
    return name.lower().replace('_', '-')


def name_of(kind: type[Any], registry: Registry) -> str:
    """Its name in the registry, or the class's own where it is not there."""
    return next((name for name, known in registry.items() if known is kind), kind.__name__)


def refuse_unknown(
    arguments: Sequence[str],
    option: str,
    kind: type[Any],
    registry: Registry,
    *,
    uses: str = 'trains',
) -> None:
    """Raise UserError for a setting that the class does not have."""
    own, name = _settings(kind), name_of(kind, registry)
    for argument in arguments:
        shown = argument.partition('=')[0]
        head, _, setting = shown.partition('.')
        setting = setting.partition('.')[0].replace('-', '_')
        if head != option or not setting or setting in own:
            continue
        near = difflib.get_close_matches(setting, own, n=1)
        meant = f'did you mean {option}.{near[0].replace("_", "-")}? ' if near else ''
        has = [other for other, known in registry.items() if setting in _settings(known)]
        if has:
            raise UserError(
                f'{shown} is a setting of {", ".join(has)}, and this {uses} {name}: {meant}give '
                f'{option} {has[0]} too, or leave it out'
            )
        known_here = ', '.join(name.replace('_', '-') for name in own) or 'no settings'
        raise UserError(f'there is no option {shown}: {meant}{name} has {known_here}')


def _settings(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]

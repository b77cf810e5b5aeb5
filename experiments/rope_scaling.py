"""`--model.rope-scaling yarn factor=4 original_context=8192`: a kind of rope scaling by its name,
which a command line of nested settings cannot choose."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

from llama_jax.errors import UserError
from llama_jax.model.config import Scaling

OPTION = '--model.rope-scaling'
KINDS: dict[str, Any] = {
    {'RopeScaling': 'llama3'}.get(kind.__name__, kind.__name__.lower()): kind
    for kind in typing.get_args(Scaling)
}


def from_command_line(arguments: Sequence[str]) -> tuple[dict[str, Scaling | None], list[str]]:
    """{'rope_scaling': what the option names} where it is given, and the other arguments. Raises
    UserError for a kind or a value that is not known."""
    others: list[str] = []
    given: list[str] | None = None
    taking = False
    for argument in arguments:
        name, _, value = argument.partition('=')
        if argument.startswith('--'):
            taking = name.replace('_', '-') == OPTION
            if taking:
                given = [value] if value else []
                continue
        if taking and given is not None:
            given.append(argument)
        else:
            others.append(argument)
    return ({} if given is None else {'rope_scaling': _of(given)}), others


def _of(words: list[str]) -> Scaling | None:
    known = ', '.join(['none', *KINDS])
    if not words or words[0].lower() not in (*KINDS, 'none'):
        raise UserError(f'{OPTION} {" ".join(words)}: the first word is one of {known}')
    if words[0].lower() == 'none':
        if words[1:]:
            raise UserError(f'{OPTION} none takes no values: leave out {" ".join(words[1:])}')
        return None
    kind = KINDS[words[0].lower()]
    hints, values = typing.get_type_hints(kind), {}
    for word in words[1:]:
        name, _, value = word.partition('=')
        if name not in hints:
            raise UserError(
                f'{OPTION} {words[0]}: {word!r} is none of {", ".join(hints)}, as name=3'
            )
        values[name] = _value(hints[name], value, word)
    try:
        return kind(**values)
    except TypeError:
        missing = [n for n in hints if n not in values and not hasattr(kind, n)]
        raise UserError(f'{OPTION} {words[0]} needs {" and ".join(missing)} too') from None


def _value(hint: Any, value: str, word: str) -> Any:
    try:
        if hint is bool:
            return {'true': True, 'false': False}[value.lower()]
        if typing.get_origin(hint) is tuple:
            return tuple(map(float, value.split(',')))
        return int(value) if hint is int else float(value)
    except (KeyError, ValueError):
        raise UserError(f'{OPTION}: {word} is no value of its kind') from None

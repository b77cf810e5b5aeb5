"""`--tune LoRA`: a kind of tuning by its name, which a command line of nested settings cannot
choose; `--tune.rank 8` sets what it has."""

from __future__ import annotations

import typing
from collections.abc import Sequence

from llama_jax.errors import UserError
from llama_jax.model.tune import Tune

OPTION = '--tune'
KINDS = {kind.__name__: kind for kind in typing.get_args(Tune)}


def from_command_line(arguments: Sequence[str], tune: Tune) -> tuple[Tune, list[str]]:
    """`tune`, or the kind that the option names where it is another, and the other arguments.
    Raises UserError for a kind that is not known, and for settings of a kind that is not chosen."""
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition('=')
        if name != OPTION:
            others.append(argument)
            continue
        value = value if equals else next(rest, '')
        kind = {name.lower(): kind for name, kind in KINDS.items()}.get(value.lower())
        if kind is None:
            raise UserError(f'{OPTION} {value}: it is one of {", ".join(KINDS)}')
        tune = tune if isinstance(tune, kind) else kind()
    own = typing.get_type_hints(type(tune))
    for argument in others:
        name, _, setting = argument.partition('=')[0].partition('.')
        setting = setting.replace('-', '_')
        if name == OPTION and setting and setting not in own:
            has = [k for k, kind in KINDS.items() if setting in typing.get_type_hints(kind)]
            if has:
                raise UserError(
                    f'{argument} is a setting of {has[0]}, and this trains {type(tune).__name__}: '
                    f'give {OPTION} {has[0]} too, or leave it out'
                )
    return tune, others

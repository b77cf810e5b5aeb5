"""`--tune LoRA`: a kind of tuning by its name, which a command line of nested settings cannot
choose; `--tune.rank 8` sets what it has."""

from __future__ import annotations

import typing
from collections.abc import Sequence

from experiments.named_option import kinds, refuse_unknown, taken
from llama_jax.model.tune import Tune

OPTION = '--tune'
KINDS = {kind.__name__: kind for kind in typing.get_args(Tune)}


def from_command_line(arguments: Sequence[str], tune: Tune) -> tuple[Tune, list[str]]:
    """`tune`, or the kind that the option names where it is another, and the other arguments.
    Raises UserError for a kind that is not known, and for settings that the chosen one has not."""
    others, named = taken(arguments, OPTION)
    if named is not None:
        (kind,) = kinds(named, OPTION, KINDS)
        tune = tune if isinstance(tune, kind) else kind()
    refuse_unknown(others, OPTION, type(tune), KINDS)
    return tune, others

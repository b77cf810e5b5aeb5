"""What the scripts share: reading a configuration, and errors in one line."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import sys
from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Annotated, Any

import tyro

import configs
from llama_jax.errors import UserError
from llama_jax.train.experiment import Experiment

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read(script: str, description: str, **options: tuple[type, Any]) -> tuple[Experiment, Any]:
    """The named experiment with the overrides of the command line, and the script's options.

    The first argument names a configuration; `options` are fields (type, default) by name. `script`
    is a module of experiments, or another by its dotted name.
    """
    script = script if '.' in script else f'experiments.{script}'
    arguments = sys.argv[1:]
    names = sorted(configs.named())
    if not arguments or arguments[0].startswith('-'):
        known = '\n  '.join(names)
        print(
            f'usage: python -m {script} CONFIGURATION [options]\n\n{description}\n\n'
            f'CONFIGURATION is one of\n  {known}\n\n'
            f'options: python -m {script} {names[0]} --help'
        )
        raise SystemExit(0 if arguments[:1] in (['-h'], ['--help'], ['--list']) else 2)
    experiment = configs.get(arguments[0])
    Command = make_dataclass(
        'Command',
        [
            *((name, kind, default) for name, (kind, default) in options.items()),
            (
                'experiment',
                Annotated[Experiment, tyro.conf.arg(name='', prefix_name=False)],
                experiment,
            ),
        ],
        frozen=True,
    )
    parse = functools.partial(
        tyro.cli,
        Command,
        prog=f'python -m {script} {arguments[0]}',
        description=description,
        args=arguments[1:],
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            command = parse()
    except SystemExit as rejected:
        cause: BaseException | None = rejected
        while cause and not isinstance(cause, UserError):  # of a dataclass that checks itself
            cause = cause.__context__
        if cause:
            raise cause from None
        parse()  # the help or an error of tyro's own, to be seen this time
        raise
    return command.experiment, command


def main(script: Callable[[], None]) -> None:
    """Run a script: bad input ends in one line and exit code 2, a signal in its own code."""
    from llama_jax.train.loop import Stopped

    logging.basicConfig(level=logging.WARNING, format='%(message)s', force=True)
    logging.getLogger('llama_jax').setLevel(logging.INFO)
    # Orbax logs the traceback of every layer and thread of an error that it also raises.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    try:
        script()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = f'{error.filename}: ' if error.filename else ''
        print(
            f'error: {where}{error.strerror}: free some space and start again with the same '
            'command; a run goes on from its newest checkpoint',
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None

"""What the scripts share: reading a configuration, and errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import logging
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import make_dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    NoReturn,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from experiments import rope_scaling, tune_option
from llama_jax import installed, runtime
from llama_jax.data import mix
from llama_jax.data.config import cache_dir
from llama_jax.errors import Stopped, UserError
from llama_jax.paths import local

if TYPE_CHECKING:
    from llama_jax.compare.grid import Grid
    from llama_jax.train.config_file import ConfigFile
    from llama_jax.train.experiment import Experiment

Options = TypeVar('Options', bound=Any)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read(
    script: str, description: str, *, tunes: bool = False, **options: tuple[type, Any]
) -> tuple[Experiment, Any]:
    """The named experiment with the overrides of the command line, and the script's options.

    The first argument names a configuration; `options` are fields (type, default) by name. `script`
    is a module of experiments, or another by its dotted name. Where it `tunes`, the first argument
    names a recipe of configs/finetune.py, and --from is its name for --start. Where it is a file,
    `options.config_file` is that file.
    """
    import configs  # loads what only training and comparing need
    from experiments import objective_option, optimizer_option
    from llama_jax.train.experiment import Experiment

    if tunes:
        arguments = _arguments(script, description, 'RECIPE', configs.recipes())
        arguments = [re.sub(r'^--from(?==|$)', '--start', argument) for argument in arguments]
        experiment = configs.recipe(arguments[0])
    else:
        arguments = _arguments(script, description, 'CONFIGURATION', configs.named())
        experiment = configs.get(arguments[0])
    given, arguments = mix.from_command_line(arguments)
    if given:
        data = dataclasses.replace(experiment.data, **given)
        experiment = dataclasses.replace(experiment, data=data)
    scaling, arguments = rope_scaling.from_command_line(arguments)
    tune, arguments = tune_option.from_command_line(arguments, experiment.tune)
    before = experiment.objective
    objective, arguments = objective_option.from_command_line(arguments, before)
    if tunes and objective.reads is not before.reads:
        raise UserError(
            f'--objective: the recipe {arguments[0]} is for {before.reads.__name__} records, which '
            f'{type(objective).__name__} does not read: leave it out, or take another recipe'
        )
    optimizer, arguments = optimizer_option.from_command_line(arguments, experiment.optimizer)
    experiment = dataclasses.replace(
        experiment, tune=tune, objective=objective, optimizer=optimizer
    )
    if {'-h', '--help'} & {*arguments}:
        description += f'\n\n{objective_option.listing()}\n\n{optimizer_option.listing()}'
    start, default = _given(arguments, '--start'), experiment
    if start is not None:  # what it is trained from says what the model is, unless overridden
        from llama_jax.train.start import settled, started

        runtime.initialize()
        workdir = _given(arguments, '--workdir') or f'runs/{experiment.name}'
        default = started(
            dataclasses.replace(experiment, start=start),
            local(workdir, '--workdir') if 'workdir' in options else None,
        )
    setting = Annotated[Experiment, tyro.conf.arg(name='', prefix_name=False)]
    default = dataclasses.replace(default, model=dataclasses.replace(default.model, **scaling))
    command = _parse(
        [*_fields(options), ('experiment', setting, default)],
        [*options, *_paths(default), 'tune', 'objective', *(['from'] if tunes else [])],
        script=script,
        description=description,
        arguments=arguments,
        config_file=configs.own.config_file(arguments[0]),
    )
    return command.experiment if start is None else settled(command.experiment, default), command


def read_grid(script: str, description: str, **options: tuple[type, Any]) -> tuple[Grid, Any]:
    """The named grid, its arms with the overrides of the command line, and the script's options;
    like `read`."""
    import configs
    from experiments import objective_option, optimizer_option
    from llama_jax.compare.grid import common, overridden
    from llama_jax.train.experiment import Experiment

    arguments = _arguments(script, description, 'GRID', configs.grids())
    objective_option.refuse(arguments)
    grid = configs.grid(arguments[0])
    grid, arguments = optimizer_option.of_grid(arguments, grid)
    settings = common(grid.arms[0].experiment)
    given, arguments = mix.from_command_line(arguments)
    if given:
        settings['data'] = dataclasses.replace(settings['data'], **given)
    start = _given(arguments, '--start')
    if start is not None:  # all arms have its model, with rows for the control tokens of any
        from llama_jax.train.start import started

        runtime.initialize()
        found = started(dataclasses.replace(grid.arms[0].experiment, start=start))
        model = dataclasses.replace(found.model, vocab=0, vocab_padding=0)
        data = dataclasses.replace(settings['data'], tokenizer=found.data.tokenizer)
        settings |= {'model': model, 'data': data}
    kinds = get_type_hints(Experiment)
    command = _parse(
        [
            *_fields(options),
            *((name, kinds[name], value) for name, value in settings.items()),
            ('suite', type(grid.suite), grid.suite),
        ],
        [*options, *_paths({**settings, 'suite': grid.suite})],
        script=script,
        description=description,
        arguments=arguments,
        config_file=configs.own.config_file(arguments[0]),
    )
    changed = overridden(grid, {name: getattr(command, name) for name in settings})
    return dataclasses.replace(changed, suite=command.suite), command


def options(kind: type[Options], script: str, description: str | None) -> Options:
    """The options of a script that reads no configuration; `script` as of `read`."""
    return _parsed(kind, list(_names(kind)), installed.command(script), description, sys.argv[1:])


def _names(kind: Any, path: str = '') -> Iterator[str]:
    """Dotted names of all options of a dataclass and those within it."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        hint, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        name = next((note.name for note in notes if getattr(note, 'name', None)), field.name)
        if dataclasses.is_dataclass(hint):
            yield from _names(hint, f'{path}{name}.')
            continue
        yield f'{path}{name}'
        if hint is bool:
            yield f'{path}no-{name}'


def _local(options: Options) -> Options:
    """The options with every path as one of this machine, which is refused otherwise."""
    paths = {
        field.name: local(value, f'--{field.name}'.replace('_', '-'))
        for field in dataclasses.fields(options)
        if isinstance(value := getattr(options, field.name), Path)
    }
    return dataclasses.replace(options, **paths)


def _arguments(script: str, description: str, what: str, names: Iterable[str]) -> list[str]:
    """The arguments, of which the first is a name. Without one: the usage, and the end."""
    arguments, names = sys.argv[1:], sorted(names)
    if arguments and not arguments[0].startswith('-'):
        return arguments
    known, program = '\n  '.join(names), installed.command(script)
    print(
        f'usage: {program} {what} [options]\n\n{_described(description)}\n\n'
        f'{what} is one of\n  {known}\n'
        'or of a file of your own: path/to/mine.py:NAME, a function that returns it\n\n'
        f'options: {program} {names[0]} --help'
    )
    raise SystemExit(0 if arguments[:1] in (['-h'], ['--help'], ['--list']) else 2)


def _given(arguments: list[str], option: str) -> str | None:
    """The value of an option; None where it is not there, or None."""
    values = [
        value if equals else following
        for argument, following in zip(arguments, [*arguments[1:], ''], strict=True)
        for name, equals, value in [argument.partition('=')]
        if name == option
    ]
    return values[-1] if values and values[-1] not in ('', 'None') else None


def _fields(options: dict[str, tuple[type, Any]]) -> list[tuple[str, Any, Any]]:
    return [(name, kind, default) for name, (kind, default) in options.items()]


def _parse(
    fields: list[tuple[str, Any, Any]],
    known: list[str],
    *,
    script: str,
    description: str,
    arguments: list[str],
    config_file: ConfigFile | None,
) -> Any:
    """The fields (name, type, default) with what the arguments say, and `config_file` beside them;
    `known` are names of options.

    Raises UserError for an option that is not among them and for values that the settings refuse.
    """
    from experiments import objective_option  # loads what only training and comparing need

    return _parsed(
        make_dataclass('Command', fields, frozen=True, namespace={'config_file': config_file}),
        [*known, *mix.OPTIONS],
        f'{installed.command(script)} {arguments[0]}',
        description,
        arguments[1:],
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        registry=objective_option.by_default(),
    )


def _parsed(
    kind: Any,
    known: list[str],
    program: str,
    description: str | None,
    arguments: list[str],
    **settings: Any,
) -> Any:
    """An object of the dataclass `kind` with what the arguments say; see `_parse`."""
    parse = functools.partial(
        tyro.cli,
        kind,
        prog=program,
        description=_described(description),
        args=arguments,
        **settings,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return _local(parse())
    except SystemExit as rejected:
        cause: BaseException | None = rejected
        while cause and not isinstance(cause, UserError):  # of a dataclass that checks itself
            cause = cause.__context__
        if cause:
            raise cause from None
        if rejected.code:
            _refuse_misspelt(arguments, known, f'{program} --help')
        parse()  # the help or an error of tyro's own, to be seen this time
        raise


def _described(description: str | None) -> str | None:
    """A description whose commands are those that work here."""
    return description and re.sub(
        r'python -m ((?:experiments|tpu)\.\w+)',
        lambda found: installed.command(found[1]),
        description,
    )


def _refuse_misspelt(arguments: list[str], known: list[str], usage: str) -> None:
    names = [f'--{name}'.replace('_', '-') for name in known]
    for argument in arguments:
        option = argument.partition('=')[0].replace('_', '-')
        if not option.startswith('--') or option in names:
            continue
        near = difflib.get_close_matches(option, names, n=1)
        if near:
            raise UserError(f'there is no option {option}: did you mean {near[0]}? (all: {usage})')


def _paths(value: Any, path: str = '') -> Iterator[str]:
    """Dotted names of all settings in nested dataclasses, dicts and tuples of dataclasses."""
    inner: Any
    if isinstance(value, dict):
        inner = value.items()
    elif dataclasses.is_dataclass(value):
        inner = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        inner = enumerate(value)
    else:
        yield path
        return
    for name, item in inner:
        yield from _paths(item, f'{path}.{name}'.lstrip('.'))


def main(script: Callable[[], None]) -> None:
    """Run a script: bad input ends in one line and exit code 2, a signal in its own code."""
    logging.basicConfig(level=logging.WARNING, format='%(message)s', force=True)
    logging.getLogger('llama_jax').setLevel(logging.INFO)
    # Orbax logs the traceback of every layer and thread of an error that it also raises.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    # It leaves tasks behind as well when a file cannot be read, which asyncio tells as it ends.
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
    sys.unraisablehook = _told
    try:
        runtime.keep_programs(cache_dir() / 'programs')
        script()
    except UserError as error:
        _end(f'error: {error}', 2)
    except BrokenPipeError:
        if not _unread():
            raise
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = f'{error.filename}: ' if error.filename else ''
        _end(
            f'error: {where}{error.strerror}: free some space and start again with the same '
            'command; a run goes on from its newest checkpoint',
            2,
        )
    except Stopped as stopped:
        _end(str(stopped), stopped.exit_code, at_once=True)
    except KeyboardInterrupt:
        _end('stopped by SIGINT', 130)


@contextlib.contextmanager
def whole_text() -> Iterator[None]:
    """Within it a text is printed piece by piece: its last line is ended, and what is logged,
    warned of or told on standard error meanwhile comes after it, for both may go to one terminal.
    """
    root = logging.getLogger()
    handlers = root.handlers[:]
    held = [MemoryHandler(10_000, logging.CRITICAL + 1, target=handler) for handler in handlers]
    root.handlers[:] = held
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            yield
    finally:
        try:
            print(flush=True)
        finally:
            root.handlers[:] = handlers
            for handler in held:
                handler.close()  # which passes on what it holds
            print(told.getvalue(), end='', file=sys.stderr, flush=True)


def _unread() -> bool:
    """Whether nobody reads the output any more, as of `| head`. The rest of it is given up."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _told(unraisable: sys.UnraisableHookArgs) -> None:
    """The hook for errors in threads of others, but for those of reads that Orbax broke off at a
    damaged file: they come to an event loop that is closed."""
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def _end(line: str, code: int, *, at_once: bool = False) -> NoReturn:
    """Leave with one line; `at_once`, or as one of several processes, by no exit handler: JAX would
    wait there for the others, and crash after a compilation that was broken off."""
    if at_once or os.environ.get(runtime.COORDINATOR):
        from llama_jax.train.agreement import leave  # loads what only training and comparing need

        leave(line, code)
    print(line, file=sys.stderr)
    raise SystemExit(code) from None

"""The user's Python file that defines a configuration, kept in the directory of the run."""

from __future__ import annotations

import hashlib
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.train import plain

NAME = 'configuration.py'
"""In the run's directory: the file as it was."""


@dataclass(frozen=True)
class ConfigFile:
    """`path/to/mine.py:NAME`, and the text of the file."""

    path: Path
    name: str
    source: bytes

    def __str__(self) -> str:
        return f'{self.path}:{self.name}'

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    def facts(self) -> dict[str, Any]:
        """For run.json and grid.json."""
        facts: dict[str, Any] = {'file': str(self.path), 'name': self.name, 'sha256': self.digest}
        own = sorted(plain.own_names())
        return {**facts, 'objectives': own} if own else facts

    def keep(self, workdir: Path) -> None:
        """Write the file's text into a run's directory. Another that is there, by which earlier
        steps were trained, stays under the beginning of its hash."""
        path = workdir / NAME
        if path.exists() and (before := path.read_bytes()) != self.source:
            earlier = hashlib.sha256(before).hexdigest()[:12]
            (workdir / f'{path.stem}-{earlier}.py').write_bytes(before)
        path.write_bytes(self.source)


def edited(facts: dict[str, Any], config_file: ConfigFile | None) -> list[str]:
    """What to say where a run goes on, of which the record `facts` tells: the file is another than
    before. Its settings are compared by themselves, and decide whether the run may go on."""
    before = facts.get('configuration')
    if config_file is None or not before or before['sha256'] == config_file.digest:
        return []
    return [
        f'{config_file} is not as it was when the run was last started (sha256 '
        f'{before["sha256"][:12]} -> {config_file.digest[:12]}); its {NAME} is written anew, '
        f'the one of then stays as {NAME[:-3]}-{before["sha256"][:12]}.py'
    ]


def executed(file: ConfigFile) -> types.ModuleType:
    """The file as a module; its objectives are known from then on to whoever reads records.

    Raises UserError, with the line in that file where there is one, for whatever it raises.
    """
    module = types.ModuleType(plain.OWN_MODULE)
    module.__file__ = str(file.path)
    sys.modules[module.__name__] = module  # where dataclasses look for the names of types
    directory = str(file.path.resolve().parent)
    if directory not in sys.path:
        sys.path.append(directory)  # what stands beside it can be imported, and hides nothing
    try:
        exec(compile(file.source, str(file.path), 'exec'), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(told(error, file.path)) from error
    plain.know(module)
    return module


def know_objectives(workdir: Path, facts: dict[str, Any], *records: Any) -> None:
    """Make the objectives known that the recorded experiments name and the project does not have:
    those of the configuration that is kept in `workdir`, which is executed.

    Raises UserError where that is not the file that `facts`, the run's record, tell of.
    """
    named = {name for record in records for name in plain.own_classes(record['objective'])}
    kept = facts.get('configuration') or {}
    of_file = {*kept.get('objectives', ())} & {
        name for record in records for name in plain.all_classes(record['objective'])
    }
    if of_file - named:
        raise UserError(
            f'{workdir} was trained by an objective {min(of_file - named)} of {kept["file"]}, and '
            'this version has one of that name, which may be another: give that of this version '
            'another name, or use the version of then'
        )
    if not named or not kept:
        return
    path = workdir / NAME
    try:
        file = ConfigFile(path, kept['name'], path.read_bytes())
    except OSError as error:
        raise UserError(
            f'{path} defines the objective {min(named)} and cannot be read ({error.strerror}): put '
            f'back the copy of {kept["file"]}'
        ) from None
    if file.digest != kept['sha256']:
        raise UserError(
            f'{path} defines the objective {min(named)} and is not what the run has kept: put back '
            f'the copy of {kept["file"]}'
        )
    beside = str(Path(kept['file']).resolve().parent)
    if beside not in sys.path:
        sys.path.append(beside)
    try:
        executed(file)
    except UserError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise UserError(
            f'{error}: modules beside {kept["file"]} are not kept with a run, put them back there'
        ) from error


def told(error: BaseException, path: Path) -> str:
    """An error of the file in one line, with its place there."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = lines[-1] if lines else None
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    place = str(path) if line is None else f'{path}:{line}'
    text = ' '.join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    kind = '' if isinstance(error, UserError) else f'{type(error).__name__}: '
    return f'{place}: {kind}{text[:300]}'.rstrip(': ')

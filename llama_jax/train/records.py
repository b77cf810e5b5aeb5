"""What a run leaves for people and for report/: run.json, metrics.jsonl, TensorBoard files."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from llama_jax.errors import UserError
from llama_jax.installed import typed
from llama_jax.train.code import training_code
from llama_jax.train.experiment import Experiment, digest, to_dict
from llama_jax.train.tensorboard import EventFile
from llama_jax.train.wandb import Mirror

_PACKAGES = (
    *('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'scipy'),
    *('sentencepiece', 'tokenizers', 'tensorflow-datasets', 'scikit-learn'),
)


class Records:
    """Writes the records of a run; only the first process writes."""

    def __init__(
        self,
        workdir: Path,
        experiment: Experiment,
        facts: dict[str, Any],
        *,
        wandb: str | None = None,
    ):
        """`facts` go into run.json; `wandb` is a project that gets the scalars as well."""
        self.workdir = workdir
        self._project = wandb
        self._mirror: Mirror | None = None
        self._writes = jax.process_index() == 0
        self._tensorboard: EventFile | None = None
        if not self._writes:
            return
        self._description = {
            'name': experiment.name,
            'experiment': to_dict(experiment),
            'digest': digest(experiment),
            'versions': versions(),
            'code': training_code(),
            'device': jax.devices()[0].device_kind,
            'devices': jax.device_count(),
            'processes': jax.process_count(),
            'git_commit': git_commit(Path(__file__).parents[2]),
            'started': datetime.now(UTC).isoformat(timespec='seconds'),
            'command': typed(),
            **facts,
        }
        write_atomically(workdir / 'run.json', json.dumps(self._description, indent=2))

    def begin(self, step: int) -> float:
        """Open the records to go on after `step`; later lines, of steps to be taken again, go.

        Returns the training seconds recorded so far.
        """
        if not self._writes:
            return 0.0
        lines = [line for line in read_metrics(self.workdir) if line['step'] <= step]
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        write_atomically(self.workdir / 'metrics.jsonl', text)
        self._tensorboard = EventFile(self.workdir / 'tensorboard', first_step=step + 1)
        if self._project is not None:
            self._mirror = Mirror(self._project, self.workdir, self._description, step=step)
        return max((line.get('seconds', 0.0) for line in lines), default=0.0)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line of metrics."""
        if self._tensorboard is None:  # not the first process
            return
        # JSON knows no NaN: what is not finite is written as null.
        values = {name: None if _not_finite(v) else v for name, v in values.items()}
        line = json.dumps({'kind': kind, 'step': step, **values}, ensure_ascii=False)
        with open(self.workdir / 'metrics.jsonl', 'a', encoding='utf-8') as file:
            file.write(line + '\n')
        numbers = {
            f'{kind}/{name}': float(value)
            for name, value in values.items()
            if isinstance(value, (int, float))
        }
        if numbers:
            self._tensorboard.scalars(step, numbers)
            if self._mirror is not None:
                self._mirror.log(step, numbers)
        if kind in ('sample', 'event'):
            self._tensorboard.text(step, kind, str(values['text']))

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._mirror is not None:
            self._mirror.close()


def read_run(workdir: Path) -> dict[str, Any] | None:
    """The run.json of `workdir`; None when there is none."""
    try:
        run = json.loads((workdir / 'run.json').read_text(encoding='utf-8'))
        if not isinstance(run, dict) or 'experiment' not in run:
            raise ValueError('it describes no experiment')
        return run
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise UserError(
            f'{workdir / "run.json"} cannot be read ({error}): mend or delete it; a training with '
            'the settings it began with writes it anew'
        ) from error


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All whole lines of metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    try:
        text = (workdir / 'metrics.jsonl').read_text(encoding='utf-8', errors='replace')
    except FileNotFoundError:
        return []
    for line in text.split('\n'):  # splitlines would cut a sample at U+2028
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, never finds half of it; several hosts may at
    once."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}-')
    with os.fdopen(handle, 'w', encoding='utf-8') as file:
        file.write(text)
    os.chmod(partial, 0o644)
    os.replace(partial, path)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide results."""
    found = {'python': sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(clone: Path) -> str | None:
    """The commit of a clone; None where the directory is none, wherever it lies: pyenv's own
    directory, say, is the clone of something else."""
    environment = {name: value for name, value in os.environ.items() if name != 'GIT_DIR'}
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=40'],
            cwd=clone,
            env={**environment, 'GIT_CEILING_DIRECTORIES': str(clone.resolve().parent)},
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

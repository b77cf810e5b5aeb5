"""A run that goes on from a checkpoint of another, in a directory of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax

from llama_jax.errors import UserError
from llama_jax.train import agreement
from llama_jax.train.checkpoint import present
from llama_jax.train.progress import say
from llama_jax.train.restore import Mean, chosen_step, named

_RECORD = 'branch.json'
_LEFT = (
    *('checkpoints', 'tensorboard', 'profile', 'run.lock', 'wandb.json', 'report*', 'evaluation*'),
    *('baselines.json', 'failure-*', 'nonfinite-*', 'damaged-*', '.*'),
)
"""What belongs to the other run alone."""


def branch(run: str, workdir: Path) -> None:
    """Make `workdir` the directory of a run that stands where `run` stood (RUN@STEP, RUN@best):
    with its checkpoint, the state of its optimizer and its place in the data.

    A training there goes on from it. Once that has begun, nothing is done. All processes call this.
    Raises UserError where `workdir` holds something else.
    """
    source, which = named(run, '--branch')
    if isinstance(which, Mean):
        raise UserError(f'--branch {run}: a mean has no optimizer to go on with; use --start {run}')
    with agreement.together():
        begun = workdir.exists() and any(workdir.iterdir())
        agreement.same({'branch': run, 'begun': begun}, 'branch')
        if begun:
            return _check(run, source, which, workdir)
        step = chosen_step(run, '--branch')  # in all processes: Orbax waits for each of them
        if jax.process_index() == 0:
            _copy(source, step, workdir)
        agreement.same({}, 'branch')


def _copy(source: Path, step: int, workdir: Path) -> None:
    record = {'run': str(source.absolute()), 'step': step}
    whole = workdir.with_name(f'.{workdir.name}.branch')
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(source, whole, ignore=shutil.ignore_patterns(*_LEFT))
    at = Path('checkpoints') / str(step)
    shutil.copytree(source / at, whole / at)
    (whole / _RECORD).write_text(json.dumps(record), encoding='utf-8')
    if workdir.exists():
        workdir.rmdir()
    whole.rename(workdir)
    say(f'{workdir} begins as a copy of {source}, step {step}')


def _check(run: str, source: Path, which: int | str | None, workdir: Path) -> None:
    """Raise UserError unless `workdir` is of a run that was branched so."""
    try:
        record = json.loads((workdir / _RECORD).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        record = {}
    same = record.get('run') == str(source.absolute())
    if not same or (isinstance(which, int) and record.get('step') != which):
        raise UserError(
            f'{workdir} holds something that is no branch of {run}: give another --workdir'
        )
    if not present(workdir / 'checkpoints'):
        raise UserError(f'{workdir} has lost its checkpoints: delete it to branch again')

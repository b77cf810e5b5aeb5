"""The directory of a run: it is one run's at a time, and not that of one which left nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import jax

from llama_jax.errors import UserError
from llama_jax.train.checkpoint import SCORES, committed, present
from llama_jax.train.progress import say
from llama_jax.train.records import read_metrics, read_run

LOCK = 'run.lock'
_GRID = 'grid.json'
"""The record of a comparison in its directory (compare/record.py)."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Makes `workdir` and holds it for this run: process 0 locks WORKDIR/run.lock, where it says
    who it is.

    The system frees the lock when its holder ends, however it ends; the file stays, and means
    nothing by itself. Raises UserError when another run holds it. Where the file system has no
    locks this is said, and nothing is held.
    """
    if jax.process_index() != 0:
        yield
        return
    path = workdir / LOCK
    if (workdir / _GRID).exists():
        raise UserError(
            f'{workdir} holds a comparison ({_GRID}), whose runs are in directories of their own: '
            'give another --workdir'
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open('a+')
    except OSError as error:
        raise UserError(
            f'cannot write in {workdir} ({error.strerror}): give another --workdir'
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_taken(workdir)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(f'{path} cannot be locked ({error.strerror}): start no second run in {workdir}')
        file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec='seconds')
        me = {'pid': os.getpid(), 'host': socket.gethostname(), 'since': since}
        file.write(json.dumps(me))
        file.flush()
        yield


def holder(workdir: Path) -> dict[str, str | int]:
    """What the last holder wrote: 'pid', 'host' and 'since'; empty where there is nothing."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((workdir / LOCK).read_text()))
    return {}


def in_use(workdir: Path) -> str | None:
    """What to say of a run that holds `workdir` now; None where none does. Changes nothing."""
    try:
        with (workdir / LOCK).open('r+') as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _taken(workdir)
    except OSError:  # no run was there, or no locks are
        return None
    return None


def forget_unsaved(workdir: Path) -> list[str]:
    """Remove the records of a run that ended before its first checkpoint: whatever its settings
    were, it left nothing to go on from. Returns a line that says so, if there was one.

    Raises UserError for those of a run whose checkpoints were there once, and are gone.
    """
    if not unsaved(workdir):
        return []
    if jax.process_index() == 0:
        shutil.rmtree(workdir / 'tensorboard', ignore_errors=True)
        for name in ('metrics.jsonl', 'run.json', SCORES):
            (workdir / name).unlink(missing_ok=True)
    return [f'an earlier run in {workdir} ended before its first checkpoint: this one begins anew']


def unsaved(workdir: Path) -> bool:
    """Whether there are the records of a run that ended before its first checkpoint. Raises
    UserError for those of a run whose checkpoints were there once, and are gone."""
    run = read_run(workdir)
    if run is None or present(workdir / 'checkpoints'):
        return False
    lines = read_metrics(workdir)
    saving, training = (run['experiment'].get(name, {}) for name in ('checkpoint', 'train'))
    first = min(saving.get('every') or math.inf, training.get('steps', math.inf))
    reached = max((line['step'] for line in lines), default=0)
    # A run that is killed while its first checkpoint is on the way has none, and may begin anew;
    # the second is only begun once the first is on disk.
    told = committed(workdir)  # None: an earlier version did not say
    saved = told or reached >= (first if told is None else 2 * first)
    if (lines and saved) or any('resumed' in str(line.get('text')) for line in lines):
        raise UserError(
            f'{workdir} holds the records of a run that reached step {reached}, but none of its '
            f'checkpoints: delete {workdir / "metrics.jsonl"} to begin anew there, or give another '
            '--workdir'
        )
    return True


def _taken(workdir: Path) -> str:
    who, how, by = 'another run', '', holder(workdir)
    if by:
        who = f'process {by["pid"]} on {by["host"]}, since {by["since"]}'
        how = f', stop it (kill {by["pid"]} there)'
    return f'{workdir} is in use by {who}: wait until it ends{how}, or give another --workdir'

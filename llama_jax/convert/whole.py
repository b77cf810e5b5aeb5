"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama_jax import units
from llama_jax.errors import UserError
from llama_jax.text.template_files import NAMED_TEMPLATES

_OURS = re.compile(r'.*\.(safetensors|json|jinja|model|txt)|' + NAMED_TEMPLATES)
"""What an export of a directory consists of."""


def check(out: Path, *, directory: bool = False) -> None:
    """Raise UserError where something is at `out` already; where a directory will be, an empty one
    may be."""
    if directory and out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f'{out} is there already: give another name, or move it away')


@contextlib.contextmanager
def written(out: Path, *, size: int, directory: bool = False) -> Iterator[Path]:
    """A path to write to, OUT.partial, which becomes `out` at the end; after an error it is gone.

    Where the process is killed it stays, and the next one begins it anew. `size`: bytes that will
    be written, at least. Raises UserError where `out` is there already, where another process
    writes it, and when the disk is too small.
    """
    check(out, directory=directory)
    partial = out.with_name(f'{out.name}.partial')
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _taken(partial, directory)
    except OSError as error:
        raise UserError(f'cannot write {out} ({error.strerror}): give another path') from error
    try:
        free = shutil.disk_usage(partial).free
        if size > free:
            raise UserError(
                f'{out} will have {units.size(size)} and {units.size(free)} are free there: free '
                'some space or give another path'
            )
        yield partial
        for path in partial.rglob('*') if directory else [partial]:
            if path.is_file():
                with path.open('rb') as file:
                    os.fsync(file.fileno())
        check(out, directory=directory)
        partial.replace(out)
    except BaseException as error:
        if directory:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f'{out} could not be written ({error.strerror}), and nothing of it is left: free '
                f'{units.size(size)} or give another path'
            ) from error
        raise
    finally:
        os.close(lock)


def _taken(partial: Path, directory: bool) -> int:
    """An empty file or directory at `partial`, locked; what a killed process left is removed."""
    if directory:
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    else:
        lock = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f'{partial} is being written by another process: wait for it, or give another '
                    'path'
                ) from None
        if not partial.exists() or os.stat(partial).st_ino != os.fstat(lock).st_ino:
            raise UserError(f'{partial} was written by another process until now: start again')
        left = sorted(path.name for path in partial.iterdir()) if directory else []
        foreign = [name for name in left if not _OURS.fullmatch(name)]
        if foreign:
            raise UserError(
                f'{partial} holds {foreign[0]}, which is not of an export: move it away'
            )
        for name in left:
            if name == NAMED_TEMPLATES:
                shutil.rmtree(partial / name)
            else:
                (partial / name).unlink()
        if not directory:
            os.truncate(lock, 0)
    except BaseException:
        os.close(lock)
        raise
    return lock

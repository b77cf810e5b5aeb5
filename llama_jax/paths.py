"""Paths that people give."""

from __future__ import annotations

import re
from pathlib import Path

from llama_jax.errors import UserError


def local(path: str | Path, what: str) -> Path:
    """A path of this machine, its ~ expanded.

    Raises UserError, which names the option or variable `what`, for a URL such as gs://bucket/run:
    taken for a path it would be a directory called `gs:`.
    """
    url = re.match(r'([A-Za-z][A-Za-z0-9+.-]+):/+', str(path))
    if url:
        shown = f'{url[1]}://{str(path)[url.end() :]}'
        mount = 'mount the bucket (gcsfuse BUCKET DIRECTORY)' if url[1] == 'gs' else 'mount it'
        raise UserError(f'{what} {shown} is no path of this machine: {mount} and give its path')
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~ of somebody who is not known here
        raise UserError(f'{what} {path}: {error}') from error

"""Hashes of the source that a result follows from: what was trained by other code is no equal."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[1]

TRAINS = ('convert', 'data', 'generate', 'model', 'objectives', 'optim', 'text', 'train')
"""Packages that decide what training makes, from the weights that it starts with to the answers
that it draws and learns from; and the modules beside them."""
EVALUATES = ('evaluate', 'compare/baselines.py', 'compare/budget.py')


def training_code() -> str:
    """Of all source that trains."""
    return digest(TRAINS, beside=True)


def evaluation_code() -> str:
    """Of all source that evaluates."""
    return digest(EVALUATES)


def all_code() -> str:
    """Of the whole package."""
    return digest(('.',))


@functools.cache
def digest(packages: tuple[str, ...], *, beside: bool = False, root: Path = ROOT) -> str:
    """Of the source of packages and modules, and of the modules of `root` itself with `beside`."""
    files = [path for name in packages for path in _sources(root / name)]
    files += list(root.glob('*.py')) * beside
    hashed = hashlib.sha256()
    for path in sorted(files):
        hashed.update(path.relative_to(root).as_posix().encode() + b'\0')
        hashed.update(hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()


def _sources(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob('*.py'))

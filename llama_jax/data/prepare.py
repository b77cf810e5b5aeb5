"""Preparing a data set on disk once, whole or not at all, while others wait."""

import contextlib
import fcntl
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from llama_jax.errors import UserError


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path` as a lock between processes. The system frees it when its holder is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Keeps back TFDS's remarks which nobody can act upon; errors still show."""
    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


@_quiet_absl()
def prepared(
    root: Path, label: str, make_builder: Callable[[str], tfds.core.GeneratorBasedBuilder]
) -> tfds.core.DatasetBuilder:
    """The data set under `root`, which `make_builder(data_dir)` knows how to prepare.

    It is written beside `root` and renamed, so `root` is absent or complete, also after kill -9.
    """
    if not root.exists():
        try:
            with locked(root.with_name(f'{root.name}.lock')):
                if not root.exists():
                    partial = root.with_name(f'{root.name}.partial')
                    shutil.rmtree(partial, ignore_errors=True)  # left behind by a killed process
                    _prepare(make_builder(str(partial)), label)
                    os.rename(partial, root)
        except OSError as error:
            raise UserError(
                f'cannot prepare {label} in {root.parent} ({error.strerror}): make room there or '
                'set LLAMA_JAX_CACHE to another directory'
            ) from error
    return make_builder(str(root))


def _prepare(builder: tfds.core.GeneratorBasedBuilder, label: str) -> None:
    progress = tqdm(
        desc=f'preparing {label}', unit=' documents', file=sys.stderr, mininterval=0.5, leave=False
    )
    generate = builder._generate_examples

    def counted(*args: Any) -> Iterator[tuple[Any, Any]]:
        for key, example in generate(*args):
            progress.update()
            yield key, example

    builder._generate_examples = counted
    # One line for the whole data set; TFDS would print and show several bars per split.
    tfds.disable_progress_bar()
    try:
        with progress, contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    finally:
        tfds.enable_progress_bar()

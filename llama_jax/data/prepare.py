"""Preparing a data set on disk once, whole or not at all, while others wait."""

import collections
import contextlib
import fcntl
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from llama_jax import installed
from llama_jax.data import contents, formats, parts, splits, text_files, workers, write
from llama_jax.data.config import Source, cache_dir
from llama_jax.data.progress import Progress
from llama_jax.errors import UserError
from llama_jax.paths import local

_VERSION = '2.0.0'  # of how files become documents; another one prepares everything anew

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path` as a lock between processes. The system frees it when its holder is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info('waiting for another process that prepares %s', path.with_suffix(''))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def quiet_absl() -> Iterator[None]:
    """Keeps back TFDS's remarks which nobody can act upon; errors still show."""
    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def prepared(root: Path, label: str, write_into: Callable[[Path], None]) -> Path:
    """`root`, which `write_into(directory)` fills where it is not there yet.

    It is written beside `root` and renamed, so `root` is absent or complete, also after kill -9;
    `write_into` then finds what it had written.
    """
    if not root.exists():
        try:
            with locked(root.with_name(f'{root.name}.lock')):
                if not root.exists():
                    partial = root.with_name(f'{root.name}.partial')
                    partial.mkdir(parents=True, exist_ok=True)
                    write_into(partial)
                    os.rename(partial, root)
        except OSError as error:
            raise UserError(
                f'cannot prepare {label} in {root.parent} ({error.strerror}): make room there or '
                'set LLAMA_JAX_CACHE to another directory; it goes on where it stopped'
            ) from error
    return root


def by_builder(
    make_builder: Callable[[str], tfds.core.GeneratorBasedBuilder], directory: Path
) -> None:
    """Lets a builder of TFDS write into `directory`, from its beginning and without remarks."""
    shutil.rmtree(directory)
    tfds.disable_progress_bar()
    try:
        with quiet_absl(), contextlib.redirect_stdout(io.StringIO()):
            make_builder(str(directory)).download_and_prepare()
    finally:
        tfds.enable_progress_bar()


def text_data_set(source: Source, processes: int | None = None) -> Path:
    """The directory of the data set that the files of a source make, prepared where it is not yet.
    Its `text` is a document, or a record as JSON.

    It is found again by the content of the files and by the settings. Splits go by a hash of the
    document, so equal documents stay together: train 90%, validation 5%, test 5%; where a few
    documents leave a held-out split empty, it gets one from train.

    Raises UserError for files that are no text and for a full disk.
    """
    parent = cache_dir() / 'datasets'
    if source.data_dir:
        parent = local(source.data_dir, f'the data_dir of {source.name!r}')
    label = f'{source.name} ({", ".join(source.files)})'
    files, how = text_files.files_of(source)
    stamps = [_stamp(file) for file in files]
    found = contents.contents([file.path for file in files], cache_dir() / 'digests', label)
    digest = hashlib.blake2b(repr((_VERSION, how)).encode(), digest_size=16)
    for file, content in zip(files, found, strict=True):
        named = f'{file.name}\0{file.format}\0{content.digest}\n'
        digest.update(named.encode('utf-8', 'surrogateescape'))  # names may be in any encoding
    key = digest.hexdigest()

    def write_into(directory: Path) -> None:
        divided = parts.divide(files, found, how)
        written, moved = _write(divided, how, directory, label, processes)
        for file, before in zip(files, stamps, strict=True):
            if _stamp(file) != before:
                shutil.rmtree(directory)
                raise UserError(f'{str(file.path)!r} was written to meanwhile: start again')
        _say_empty(files, divided, written)
        _complete(directory, source.name, key, divided, written, moved)

    return prepared(parent / key, label, write_into)


def _stamp(file: text_files.File) -> tuple[int, ...]:
    with formats.reading(file.path):
        return contents.stamp(file.path)


def _write(
    divided: list[parts.Part],
    how: text_files.Reading,
    directory: Path,
    label: str,
    processes: int | None,
) -> tuple[list[parts.Written], dict[float | str, str]]:
    """Writes the parts that are missing; once more where a split would stay empty."""
    moved: dict[float | str, str] = {}
    while True:
        place = directory / f'pass-{len(moved)}'
        place.mkdir(exist_ok=True)
        written = _write_parts(divided, how, place, label, moved, processes)
        before = len(moved)
        moved.update(_to_move(written))
        if len(moved) == before:
            return written, moved
        shutil.rmtree(place)


def _write_parts(
    divided: list[parts.Part],
    how: text_files.Reading,
    place: Path,
    label: str,
    moved: dict[float | str, str],
    processes: int | None,
) -> list[parts.Written]:
    jobs = [parts.Job(part, how, place, moved) for part in divided]
    missing = [job for job in jobs if job.written() is None]
    total = sum(part.bytes for part in divided)
    done = total - sum(job.part.bytes for job in missing)
    remedy = (
        'if memory was short, prepare with fewer processes: `'
        f'{installed.command("prepare")} CONFIGURATION --processes 1`; it goes on where it stopped'
    )
    if processes is None:
        processes = 0 if total - done <= contents.CHUNK else workers.cores()
    if done:
        log.info('preparing %s: going on after %s of %s MB', label, done // 10**6, total // 10**6)
    with Progress(f'preparing {label}', total, done) as progress:
        for _ in workers.run(missing, processes, progress.add, remedy):
            pass
    results = [job.written() for job in jobs]
    return [result for result in results if result is not None]


def _to_move(written: list[parts.Written]) -> dict[float | str, str]:
    """What fills an empty split. Few documents may all be held out by their hashes: then those of
    one split are for training. Of training the first positions are held out, where others stay."""
    there = {split for part in written for split in part.shards}
    if 'train' not in there:
        donors = [split for split in ('test', 'validation') if split in there]
        return {split: 'train' for split in donors[:1]}
    positions = {p for part in written for p in part.first_positions.get('train', ())}
    empty = [split for split in ('validation', 'test') if split not in there]
    return dict(zip(sorted(positions)[: max(len(positions) - 1, 0)], empty, strict=False))


def _say_empty(
    files: list[text_files.File], divided: list[parts.Part], written: list[parts.Written]
) -> None:
    if not any(part.shards for part in written):
        first = str(files[0].path)
        raise UserError(
            f'{first!r} holds no text: give a file with some'
            if len(files) == 1
            else f'none of {len(files)} files holds text, such as {first!r}: give some with text'
        )
    spans = collections.Counter(span.file.name for part in divided for span in part.spans)
    empty = collections.Counter(name for part in written for name in part.empty)
    names = [name for name, count in empty.items() if count == spans[name]]
    if names:
        log.warning(
            '%d of %d files hold no text and are skipped, such as %s',
            len(names),
            len(files),
            names[0],
        )


def _complete(
    directory: Path,
    source: str,
    key: str,
    divided: list[parts.Part],
    written: list[parts.Written],
    moved: dict[float | str, str],
) -> None:
    """Names the shards as TFDS does and describes them."""
    place = directory / f'pass-{len(moved)}'
    by_split: dict[str, list[write.Shard]] = {}
    for split in splits.NAMES:
        shards = [part.shards[split] for part in written if split in part.shards]
        for number, shard in enumerate(shards):
            name = write.shard_name(source, split, number, len(shards))
            by_split.setdefault(split, []).append(shard._replace(file=name))
            if (place / shard.file).exists():  # else an earlier run named it
                os.rename(place / shard.file, directory / name)
    write.write_description(
        directory,
        name=source,
        config=key,
        version=_VERSION,
        description='Documents from local files.',
        texts=('text', 'origin'),
        splits=by_split,
    )
    shutil.rmtree(place)


def damaged(root: Path, problem: object) -> UserError:
    """What to say of a data set that was prepared and cannot be read any more."""
    return UserError(
        f'the prepared data in {root} is damaged ({problem}): delete it with `rm -r {root}` and '
        'start again, which prepares it anew'
    )


def open_prepared(root: Path) -> Any:
    """The builder of a data set that `prepared` wrote. Raises UserError where it is damaged."""
    if problem := write.damage(root):
        raise damaged(root, problem)
    try:
        with quiet_absl():
            return tfds.builder_from_directory(root)
    except Exception as error:  # of JSON, of protocol buffers, of TFDS
        raise damaged(root, error) from error

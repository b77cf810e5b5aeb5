"""Digests of files, remembered while these stay untouched: 20 GB are not read at every start."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from llama_jax.data import formats, workers
from llama_jax.data.progress import Progress

CHUNK = 1 << 25
_RACY_NS = 2_000_000_000


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file holds: its digest, and how many line ends are in each 32 MiB of it."""

    digest: str
    line_ends: tuple[int, ...]


def stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file is written to (the system sets the time of change, nobody else can)."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def contents(paths: Sequence[Path], memory: Path, label: str) -> list[Content]:
    """The content of every file, read by as many threads as there are cores.

    `memory` is the directory of what earlier calls found out. Raises UserError naming a file that
    cannot be read.
    """
    names = [os.path.abspath(path) for path in paths]
    key = hashlib.blake2b(repr((CHUNK, names)).encode(), digest_size=16).hexdigest()
    note = memory / f'{key}.json'
    known = _read(note)
    stamps = []
    for path in paths:
        with formats.reading(path):
            stamps.append(stamp(path))
    found: dict[str, Content] = {}
    for name, now in zip(names, stamps, strict=True):
        if name in known and tuple(known[name][0]) == now:
            found[name] = Content(known[name][1], tuple(known[name][2]))
    missing = [(n, p, s) for n, p, s in zip(names, paths, stamps, strict=True) if n not in found]
    if missing:
        begun = time.time_ns()
        found.update(_digest(missing, label))
        # A file that was written a moment ago may be written again without another time stamp.
        sure = {n: s for n, s in zip(names, stamps, strict=True) if s[-1] < begun - _RACY_NS}
        entries = {n: (s, found[n].digest, found[n].line_ends) for n, s in sure.items()}
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f'.{os.getpid()}')
        partial.write_text(json.dumps(entries))
        os.replace(partial, note)
    return [found[name] for name in names]


def _read(note: Path) -> dict[str, tuple[list[int], str, list[int]]]:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return {}


def _digest(files: Sequence[tuple[str, Path, tuple[int, ...]]], label: str) -> dict[str, Content]:
    tasks = [
        (name, path, start)
        for name, path, (_, size, *_) in files
        for start in range(0, max(size, 1), CHUNK)
    ]
    pool = concurrent.futures.ThreadPoolExecutor(workers.cores())
    total = sum(size for _, _, (_, size, *_) in files)
    try:
        with Progress(f'reading {label}', total) as progress:
            results = []
            for digest, line_ends, count in pool.map(lambda task: _chunk(*task[1:]), tasks):
                progress.add(count)
                results.append((digest, line_ends))
    finally:
        pool.shutdown(cancel_futures=True)
    chunks: dict[str, list[tuple[bytes, int]]] = {}
    for (name, *_), result in zip(tasks, results, strict=True):
        chunks.setdefault(name, []).append(result)
    return {
        name: Content(
            hashlib.blake2b(b''.join(digest for digest, _ in parts), digest_size=16).hexdigest(),
            tuple(line_ends for _, line_ends in parts),
        )
        for name, parts in chunks.items()
    }


def _chunk(path: Path, start: int) -> tuple[bytes, int, int]:
    """Digest, line ends and length of 32 MiB from `start`."""
    digest, line_ends, length = hashlib.blake2b(digest_size=16), 0, 0
    for block in formats.blocks(path, None, start, start + CHUNK):
        digest.update(block)
        line_ends += block.count(b'\n')
        length += len(block)
    return digest.digest(), line_ends, length

"""Speed and memory of preparing text: `python -m benchmarks.prepare [--megabytes 1 10 100 2000]`.

Real text (the source code of the installed packages, repeated with a number in front) is written as
.txt, as one line, as .jsonl and as .jsonl.gz, and each is prepared in a fresh process. Shown are MB
of text per second, the same per second of processor time, and the peak of memory of the largest
process. Text of 1,000 MB takes 4 GB of the disk.
"""

import dataclasses
import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro

Form = Literal['txt', 'line', 'jsonl', 'jsonl.gz']

_PREPARE = """
import json, resource, sys, time
from llama_jax.data import prepare
from llama_jax.data.config import Source
idle = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF,)][0]
begin = time.perf_counter()
prepare.text_data_set(Source('text_files', files=(sys.argv[1],)), int(sys.argv[2]))
seconds = time.perf_counter() - begin
mine, theirs = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
unit = 1 if sys.platform == 'darwin' else 1024
print(json.dumps(dict(
    seconds=seconds,
    cpu_seconds=sum(one.ru_utime + one.ru_stime for one in (mine, theirs)),
    idle_mb=idle * unit / 1e6,
    peak_mb=max(mine.ru_maxrss, theirs.ru_maxrss) * unit / 1e6,
)))
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    megabytes: tuple[int, ...] = (1, 10, 100)
    forms: tuple[Form, ...] = ('txt', 'line', 'jsonl', 'jsonl.gz')
    processes: int = 1
    directory: Path | None = None
    """Where the texts and the data sets are written meanwhile; None: the system's."""
    json: Path | None = None
    """Where the figures are written as well."""


def texts(size: int) -> Iterator[str]:
    """Different texts of `size` bytes in all, about."""
    paths = sorted(Path(sysconfig.get_path('purelib')).rglob('*.py'))
    number = 0
    while size > 0:
        for path in paths:
            text = f'{number}\n{path.read_text(encoding="utf-8", errors="replace")}'
            number += 1
            yield text
            size -= len(text.encode())
            if size <= 0:
                return


def write(path: Path, form: Form, size: int) -> int:
    """Writes `size` bytes of text in one form; gives how many it became."""
    written = 0
    with gzip.open(path, 'wb', compresslevel=4) if form == 'jsonl.gz' else path.open('wb') as file:
        for text in texts(size):
            written += len(text.encode())
            if form == 'txt':
                file.write(text.encode())
            elif form == 'line':
                file.write(text.replace('\n', ' ').encode())
            else:
                file.write(json.dumps({'text': text}).encode() + b'\n')
    return written


def measure(form: Form, megabytes: int, processes: int, directory: Path) -> dict[str, float]:
    """Figures of preparing one file in a process of its own."""
    path = directory / f'text.{form}'
    size = write(path, form, megabytes * 10**6)
    environment = {**os.environ, 'LLAMA_JAX_CACHE': str(directory / 'cache')}
    command = [sys.executable, '-c', _PREPARE, str(path), str(processes)]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(out.stdout.splitlines()[-1])
    shutil.rmtree(directory / 'cache')
    path.unlink()
    return {
        'megabytes': size / 1e6,
        'megabytes_per_second': size / 1e6 / figures['seconds'],
        'megabytes_per_core_second': size / 1e6 / figures['cpu_seconds'],
        **figures,
    }


def main(settings: Settings) -> None:
    """Measures, and prints a table."""
    rows = []
    print('form         MB    MB/s   MB/s a core   peak MB (idle)')
    for form in settings.forms:
        for megabytes in settings.megabytes:
            with tempfile.TemporaryDirectory(dir=settings.directory) as directory:
                row = measure(form, megabytes, settings.processes, Path(directory))
            rows.append({'form': form, **row})
            print(
                f'{form:<9}{megabytes:>6,}{row["megabytes_per_second"]:>8.0f}'
                f'{row["megabytes_per_core_second"]:>14.0f}'
                f'{row["peak_mb"]:>10.0f} ({row["idle_mb"]:.0f})',
                flush=True,
            )
    figures = {
        'command': 'python -m benchmarks.prepare',
        'machine': f'{platform.machine()}, {os.cpu_count()} cores, Python '
        f'{platform.python_version()}',
        'processes': settings.processes,
        'rows': rows,
    }
    if settings.json is not None:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    main(tyro.cli(Settings))

"""Preparing that is stopped, killed or out of room: one line, nothing left running or lost."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from llama_jax.data import prepare, workers
from llama_jax.data.config import Source
from llama_jax.errors import UserError
from tests.data.jobs import Failing, Killing, Leaving


def source_of(*files, **settings):
    return Source('text_files', files=tuple(map(str, files)), **settings)


def texts(root):
    """Every text of a prepared data set, as TFDS reads it."""
    builder = tfds.builder_from_directory(root)
    return [
        r['text'].decode() for split in builder.info.splits for r in builder.as_data_source(split)
    ]


PREPARE = """
import logging, sys
from llama_jax.data import contents, parts, prepare
from llama_jax.data.config import Source
from llama_jax.errors import UserError
logging.basicConfig(level=logging.INFO)
parts.CHUNK = contents.CHUNK = 1 << 20
try:
    print(prepare.text_data_set(Source('text_files', files=(sys.argv[1],)), int(sys.argv[2])))
except UserError as error:
    sys.exit(f'error: {error}')
"""


@pytest.fixture
def large(tmp_path, modules):
    """A file of some tens of megabytes."""
    text = ''.join(path.read_text('utf-8') for path in sorted(modules.iterdir()))
    path = tmp_path / 'large.txt'
    path.write_text(''.join(f'{n}\n{text}' for n in range(-(-40_000_000 // len(text)))), 'utf-8')
    return path


def started(path, processes=2):
    return subprocess.Popen(
        [sys.executable, '-c', PREPARE, str(path), str(processes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def notes(cache):
    return list((cache / 'datasets').glob('*.partial/pass-0/part-*.json'))


def after_parts(process, cache, count):
    while len(notes(cache)) < count:
        assert process.poll() is None
        time.sleep(0.005)


def children(process):
    found = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    if not found.exists():
        pytest.skip('needs /proc')
    return [int(pid) for pid in found.read_text().split()]


def gone(pids):
    """Whether processes end within two seconds."""
    for _ in range(100):
        if not any(Path(f'/proc/{pid}/cmdline').exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_preparation_leaves_no_process_and_goes_on(number, large, own_cache):
    process = started(large)
    after_parts(process, own_cache, 4)
    helpers = children(process)
    assert len(helpers) == 2
    process.send_signal(number)
    process.communicate()
    assert gone(helpers)
    assert not [p for p in (own_cache / 'datasets').iterdir() if p.suffix == '' and p.is_dir()]
    kept = {path: path.stat().st_mtime_ns for path in notes(own_cache)}
    assert len(kept) >= 4
    process = started(large)
    after_parts(process, own_cache, len(kept) + 1)
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept)
    out, err = process.communicate()
    assert process.returncode == 0 and 'going on after' in err
    root = Path(out.strip())
    assert sum(map(len, texts(root))) == len(large.read_text('utf-8'))
    assert not list((own_cache / 'datasets').glob('*.partial'))


def test_a_killed_worker_is_one_line_with_the_remedy(large, own_cache):
    process = started(large)
    after_parts(process, own_cache, 1)
    os.kill(children(process)[0], signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith('error: ')]
    assert 'killed by SIGKILL' in line and '--processes 1' in line
    assert len(notes(own_cache)) >= 1
    process = started(large, processes=1)
    process.communicate()
    assert process.returncode == 0


def test_of_several_errors_the_first_in_order_is_told():
    jobs = [Failing(0), Failing(1, pause=0.3), Failing(2)]
    for processes in (0, 1, 2, 3):
        with pytest.raises(UserError, match='job 1'):
            list(workers.run(jobs, processes, lambda count: None, ''))
    with pytest.raises(RuntimeError, match='ZeroDivisionError'):
        list(workers.run([Failing(0), Failing(9)], 2, lambda count: None, ''))
    read = []
    assert list(workers.run([Failing(0)] * 5, 2, read.append, '')) == [0] * 5
    assert sum(read) == 25


def test_a_process_that_had_nothing_to_do_may_die(tmp_path):
    jobs = [Killing(tmp_path / 'pid'), Leaving(tmp_path / 'pid')]
    assert list(workers.run(jobs, 2, lambda count: None, '')) == [None, 'done']


def test_a_full_disk_is_one_line_with_the_remedy(large, own_cache):
    size = 5_000_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with pytest.raises(UserError, match=r'File too large.*set LLAMA_JAX_CACHE.*goes on where'):
            prepare.text_data_set(source_of(large), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert prepare.text_data_set(source_of(large)).exists()

"""Running a grid with processes that do nothing but what is tested."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llama_jax.compare import runner
from llama_jax.compare.grid import FINISHED, LOG, Planned

ROOT = Path(__file__).parents[2]
FINISH = f"import pathlib, sys; pathlib.Path(sys.argv[1], '{FINISHED}').write_text('{{}}')"


def planned(*places):
    return [Planned(place.split('/')[0], place, None) for place in places]


def python(workdir, codes, *, otherwise=FINISH):
    """Commands that run the code of a place, with its directory as argument."""

    def command(run):
        code = codes.get(run.place, otherwise)
        return [sys.executable, '-c', code, str(run.directory(workdir))]

    return command


def test_runs_that_are_finished_are_left_alone(tmp_path, capsys):
    runs = planned('a/seed-0', 'b/seed-0')
    (tmp_path / 'a/seed-0').mkdir(parents=True)
    (tmp_path / 'a/seed-0' / FINISHED).write_text('{"mine": 1}')
    assert runner.run_all(runs, tmp_path, command=python(tmp_path, {}), jobs=1) == []
    assert (tmp_path / 'a/seed-0' / FINISHED).read_text() == '{"mine": 1}'
    assert not (tmp_path / 'a/seed-0' / LOG).exists()
    assert (tmp_path / 'b/seed-0' / FINISHED).exists()
    told = capsys.readouterr().err
    assert '2 runs, 1 of them finished before' in told
    assert '[2/2] b/seed-0 begins' in told
    assert re.search(r'b/seed-0 finished in \d\.\d s; ', told)
    assert 'none left' in told


def test_a_run_that_fails_is_told_with_its_last_line_and_stops_no_other(tmp_path):
    runs = planned('a/seed-0', 'b/seed-0', 'c/seed-0', 'd/seed-0')
    codes = {
        'a/seed-0': "print('one'); raise SystemExit('the last word')",
        'b/seed-0': 'import os; os.kill(os.getpid(), 9)',
        'c/seed-0': "print('left without a result')",
    }
    failed = runner.run_all(runs, tmp_path, command=python(tmp_path, codes), jobs=1)
    assert [line.split()[0] for line in failed] == ['a/seed-0', 'b/seed-0', 'c/seed-0']
    log = tmp_path / 'a/seed-0' / LOG
    assert failed[0] == f'a/seed-0 failed (1): the last word (all of it in {log})'
    assert 'was killed by SIGKILL' in failed[1]
    assert 'left without a result' in failed[2]
    assert (tmp_path / 'd/seed-0' / FINISHED).exists()
    assert log.read_text() == 'one\nthe last word\n'


def test_several_run_at_once(tmp_path):
    """Each waits for the other: alone, neither would end."""
    code = textwrap.dedent("""
        import pathlib, sys, time
        mine = pathlib.Path(sys.argv[1])
        (mine / 'here').touch()
        while len(list(mine.parent.parent.glob('*/*/here'))) < 2: time.sleep(.02)
        """)
    runs = planned('a/seed-0', 'b/seed-0')
    command = python(tmp_path, {}, otherwise=code + FINISH)
    assert runner.run_all(runs, tmp_path, command=command, jobs=2) == []


def test_no_more_run_at_once_than_jobs(tmp_path):
    code = textwrap.dedent("""
        import os, pathlib, sys, time
        top = pathlib.Path(sys.argv[1]).parent.parent
        os.mkdir(top / 'alone'); time.sleep(.1); os.rmdir(top / 'alone')
        """)
    runs = planned('a/seed-0', 'b/seed-0', 'c/seed-0')
    command = python(tmp_path, {}, otherwise=code + FINISH)
    assert runner.run_all(runs, tmp_path, command=command, jobs=1) == []


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


PARENT = """
import sys
from pathlib import Path
from llama_jax.compare import runner
from tests.compare.test_runner import planned, python, CHILD
workdir = Path(sys.argv[1])
try:
    runner.run_all(planned('a/seed-0', 'b/seed-0', 'c/seed-0'), workdir,
                   command=python(workdir, {}, otherwise=CHILD), jobs=2)
except runner.Stopped as stopped:
    print(stopped)
    raise SystemExit(stopped.exit_code)
"""

CHILD = """
import os, pathlib, signal, sys, time
from llama_jax.compare.runner import leave_with_parent
mine = pathlib.Path(sys.argv[1])
def save(number, frame):
    (mine / 'saved').write_text(signal.Signals(number).name)
    raise SystemExit(143)
signal.signal(signal.SIGTERM, save)
leave_with_parent()
(mine / 'pid').write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path):
    """A process that runs a grid of three, two at once, when both have begun."""
    process = subprocess.Popen(
        [sys.executable, '-c', PARENT, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begun = [tmp_path / place / 'pid' for place in ('a/seed-0', 'b/seed-0')]
    wait_for(lambda: all(path.exists() and path.read_text() for path in begun))
    with process:
        yield process
        process.kill()


def pids(workdir):
    return [int((workdir / place / 'pid').read_text()) for place in ('a/seed-0', 'b/seed-0')]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie is as good as gone: it waits for its parent, or for init.
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_leaves_with_a_message(parent, tmp_path, number):
    parent.send_signal(number)
    output, _ = parent.communicate(timeout=30)
    assert parent.returncode == 128 + number
    last = output.splitlines()[-1]
    assert last.startswith(f'stopped by {signal.Signals(number).name}; 3 of 3 runs are left')
    assert 'the same command goes on' in last
    for place in ('a/seed-0', 'b/seed-0'):
        assert (tmp_path / place / 'saved').read_text() == 'SIGTERM'
    assert not any(map(alive, pids(tmp_path)))
    assert not (tmp_path / 'c/seed-0').exists()


def test_processes_save_and_leave_when_the_parent_is_killed(parent, tmp_path):
    parent.kill()
    parent.wait()
    saved = [tmp_path / place / 'saved' for place in ('a/seed-0', 'b/seed-0')]
    wait_for(lambda: all(path.exists() for path in saved))
    wait_for(lambda: not any(map(alive, pids(tmp_path))))


@pytest.mark.parametrize(
    'content, line',
    [
        (b'', 'an empty log'),
        (b'one\ntwo\n\n', 'two'),
        (b'10%\r20%\r30%\n', '30%'),
        ('ä'.encode() * 9000 + b'\nend', 'end'),
        (b'\xff\xfe', '��'),
    ],
)
def test_last_line(tmp_path, content, line):
    (tmp_path / LOG).write_bytes(content)
    assert runner.last_line(tmp_path / LOG) == line
    assert runner.last_line(tmp_path / 'none') == 'no log'


def test_time_that_is_left():
    assert runner._left(0, [5.0], 1) == 'none left'
    assert runner._left(3, [], 1) == '3 left'
    assert runner._left(3, [100.0, 140.0], 1) == '3 left, about 6 min 00 s'
    assert runner._left(3, [100.0, 140.0], 2) == '3 left, about 4 min 00 s'

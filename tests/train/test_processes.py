"""Two real processes with one device each: the losses and checkpoints of one process with two."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_jax.train.records import read_metrics, read_run
from tests.flags import FAST_COMPILATION
from tests.train.test_resume import DRIVER, ROOT, end, options

pytestmark = pytest.mark.multiprocess


def start(workdir, text, *more, processes=1, when='never:SIGTERM'):
    """The tiny experiment as `processes` processes over two devices."""
    command = [sys.executable, str(DRIVER), when, 'quickstart', *options(text)]
    command += ['--workdir', str(workdir), *more]
    each = 2 // processes
    if processes > 1:
        launcher = [sys.executable, '-m', 'tpu.local', '--processes', str(processes)]
        command = [*launcher, '--devices-per-process', str(each), '--', *command]
    flags = f'{FAST_COMPILATION} --xla_force_host_platform_device_count={each}'
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


SHORT = ('--train.steps', '12', '--evaluation.every', '6', '--evaluation.batches', '2')


@pytest.fixture(scope='module')
def runs(text, tmp_path_factory):
    """Directories of a run of one process; of one that two began and one finished; of one that
    one began and two finished, each with half of every layer. Last lines of those that were
    stopped."""
    root = tmp_path_factory.mktemp('processes')
    one, two_one, one_two = (root / name for name in ('one', 'two_one', 'one_two'))
    in_one_go = start(one, text, *SHORT)
    # Only one of the two is told to stop.
    stopped = end(start(two_one, text, *SHORT, processes=2, when='3:SIGTERM:1'), 128 + 15)
    end(in_one_go, 0)
    finishing = start(two_one, text, *SHORT)
    shutil.copytree(one, one_two)
    shutil.rmtree(one_two / 'checkpoints' / '12')
    end(start(one_two, text, *SHORT, '--mesh.tensor', '2', processes=2), 0)
    end(finishing, 0)
    return one, two_one, one_two, stopped


def records(workdir, kind, *names):
    lines = [line for line in read_metrics(workdir) if line['kind'] == kind]
    return np.array([[line[name] for name in ('step', *names)] for line in lines])


@pytest.mark.slow
def test_one_process_told_to_stop_stops_both_after_the_same_step(runs):
    *_, stopped = runs
    last = [line for line in stopped if 'stopped by SIGTERM' in line]
    assert sorted(line[:3] for line in last) == ['[0]', '[1]']
    assert {line[4:] for line in last} == {last[0][4:]}
    assert not any('Traceback' in line for line in stopped)
    assert signal.SIGTERM == 15


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(runs):
    one, two_one, _, stopped = runs
    names = ('loss', 'grad_norm', 'weight')
    wanted = records(one, 'train', *names)
    assert list(wanted[:, 0]) == list(range(1, 13))
    np.testing.assert_allclose(records(two_one, 'train', *names), wanted, rtol=2e-6)
    assert read_run(one)['processes'] == 1 and read_run(one)['devices'] == 2


@pytest.mark.slow
def test_what_two_saved_one_restores_and_the_other_way_round(runs):
    one, two_one, one_two, _ = runs
    wanted = records(one, 'train', 'loss', 'weight')
    (event, *_) = [line for line in read_metrics(two_one) if line['kind'] == 'event']
    assert event['text'] == 'resumed from the checkpoint of step 5'
    np.testing.assert_allclose(records(two_one, 'train', 'loss', 'weight'), wanted, rtol=2e-6)
    facts = read_run(one_two)
    assert facts['processes'] == 2 and facts['experiment']['mesh']['tensor'] == 2
    texts = [line['text'] for line in read_metrics(one_two) if line['kind'] == 'event']
    assert 'resumed from the checkpoint of step 6' in texts
    # Sums over the halves of a layer round differently, and dropout does not.
    np.testing.assert_allclose(records(one_two, 'train', 'loss', 'weight'), wanted, rtol=2e-5)


@pytest.mark.slow
def test_two_processes_branch_what_one_saved(runs, text):
    """Process 0 alone copies, while the other waits."""
    one, *_ = runs
    branched = one.with_name('branched')
    end(start(branched, text, *SHORT, '--branch', f'{one}@6', processes=2), 0)
    texts = [line['text'] for line in read_metrics(branched) if line['kind'] == 'event']
    assert 'resumed from the checkpoint of step 6' in texts
    wanted = records(one, 'train', 'loss', 'weight')
    np.testing.assert_allclose(records(branched, 'train', 'loss', 'weight'), wanted, rtol=2e-6)


@pytest.mark.slow
def test_validation_counts_every_byte_once(runs):
    one, two_one, one_two, _ = runs
    wanted = records(one, 'validation', 'bytes', 'bits_per_byte')
    assert list(wanted[:, 0]) == [6, 12] and (wanted[:, 1] > 0).all()
    for workdir in (two_one, one_two):
        got = records(workdir, 'validation', 'bytes', 'bits_per_byte')
        np.testing.assert_allclose(got, wanted, rtol=2e-5)


def test_processes_with_other_data_are_refused_by_name(text, tmp_path):
    """The files have the same name, on disks of their own."""
    lines = text.read_text().splitlines()
    for process in (0, 1):
        (tmp_path / str(process)).mkdir()
        path = tmp_path / str(process) / 'text.jsonl'
        path.write_text('\n'.join(lines[: len(lines) - 9 * process]))
    apart = f'in:{tmp_path}'
    told = end(start(tmp_path / 'run', Path('text.jsonl'), processes=2, when=apart), 2)
    errors = [line for line in told if 'error: ' in line]
    assert sorted(line[:3] for line in errors) == ['[0]', '[1]']
    for line in errors:
        assert 'the processes of this run differ in their data (process 0 -> the other): ' in line
        assert 'process 1 has ' in line
        assert 'sources.0.digest: ' in line
    assert not any('compiling' in line or 'Traceback' in line for line in told)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(text, tmp_path):
    """Which wait for it in a step, and no longer than seconds."""
    begun = time.monotonic()
    only = ('--train.steps', '12', '--evaluation.every', '0')
    run = start(tmp_path, text, *only, processes=2, when='3:FAIL:1')
    told = end(run, 2)
    failed = 'the training failed: RuntimeError: a device is gone'
    assert any(line.startswith(f'[1] error: {failed}') for line in told)
    assert any(
        line.startswith(f'[0] process 1 ended, and this one with it: {failed}') for line in told
    )
    assert not any('Traceback' in line for line in told)
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_chats_of_two_processes_have_the_losses_of_one(tmp_path):
    """Whose learnt tokens are not equally many on both."""
    path = tmp_path / 'chats.jsonl'
    said = [('ask me' * (i % 5), 'so' * (1 + i % 7)) for i in range(200)]
    lines = [
        {'messages': [{'role': 'user', 'content': f'?{a}'}, {'role': 'assistant', 'content': b}]}
        for a, b in said
    ]
    path.write_text('\n'.join(map(json.dumps, lines)))
    learn = ('--evaluation.every', '0', '--train.seq-len', '64', '--data.chat', 'llama2')
    learn += ('--train.steps', '8', '--model.layers', '1', '--data.tokenizer.kind', 'bytes')
    running = [start(tmp_path / str(n), path, *learn, processes=n, when='chats:') for n in (1, 2)]
    for process in running:
        end(process, 0)
    one, two = (
        records(tmp_path / str(processes), 'train', 'loss', 'grad_norm', 'weight')
        for processes in (1, 2)
    )
    assert len(one) == 8 and len({*one[:, 3]}) > 1
    np.testing.assert_allclose(two, one, rtol=2e-6)

"""Nothing is lost, whatever ends a run: a validation, a signal, the data, another run beside it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import jax
import pytest

from llama_jax import layout
from llama_jax import mesh as meshes
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.loader import Loader
from llama_jax.errors import Stopped, UserError
from llama_jax.mesh import MeshConfig
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train import checkpoint, loop, reading, run, validate
from llama_jax.train.checkpoint import present
from llama_jax.train.records import read_run
from llama_jax.train.signals import Signals
from llama_jax.train.step import initial_params
from llama_jax.train.workdir import LOCK
from tests.train.conftest import changed
from tests.train.test_loop import lines, on_one_device, saved_steps


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', on_one_device(meshes.make))


def short(experiment, *, every, validates):
    """Four steps, with checkpoints and validations so often; one program for all tests."""
    experiment = changed(experiment, 'train', steps=4)
    experiment = changed(experiment, 'checkpoint', every=every)
    experiment = changed(experiment, 'evaluation', every=validates, batches=1)
    schedule = replace(experiment.optimizer.schedule, warmup_steps=1)
    return changed(experiment, 'optimizer', schedule=schedule)


def on_disk(workdir):
    """Steps of the finished checkpoints, as another process sees them."""
    return present(workdir / 'checkpoints')


def kill_when(happens):
    """A function like `happens` that is struck by a signal first."""

    def struck(*args, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return happens(*args, **settings)

    return struck


@pytest.mark.slow
def test_a_validation_saves_nothing_and_the_rest_is_saved_before_it(experiment, tmp_path):
    seen = []

    def measure(*_):
        seen.append(on_disk(tmp_path))
        return {}

    loop.train(short(experiment, every=3, validates=2), tmp_path, measure=measure)
    assert seen == [[], [3, 4]]
    assert [line['step'] for line in lines(tmp_path, 'validation')] == [2, 4]


@pytest.mark.slow
def test_a_validation_that_fails_costs_no_step(experiment, tmp_path):
    """It is one line, and the next start begins with it."""
    planned, broken = short(experiment, every=100, validates=2), []

    def measure(*_):
        broken.append(True)
        if len(broken) == 1:
            raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory\nof a test')
        return {'measured': 1.0}

    with pytest.raises(UserError) as raised:
        loop.train(planned, tmp_path, measure=measure)
    message = str(raised.value)
    assert message.startswith(
        'the validation after step 2 failed: RuntimeError: RESOURCE_EXHAUSTED'
    )
    assert message.endswith('the run goes on from step 2') and '\n' not in message
    (kept,) = re.findall(r'all of it in (\S+)\)', message)
    assert 'in measure' in Path(kept).read_text()
    assert on_disk(tmp_path) == [2]
    state = loop.train(planned, tmp_path, measure=measure)
    assert int(state.step) == 4
    assert [line['step'] for line in lines(tmp_path, 'light')] == [2, 4]
    assert [line['step'] for line in lines(tmp_path, 'train')] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_last_validation_is_made_up_for(experiment, tmp_path):
    planned = short(experiment, every=100, validates=4)
    with pytest.raises(
        Stopped, match=r'stopped by SIGTERM after step 4, which is saved in'
    ) as stop:
        loop.train(planned, tmp_path, measure=kill_when(lambda *_: {}))
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert on_disk(tmp_path) == [4] and not lines(tmp_path, 'light')
    for _ in range(2):  # and then it is there
        loop.train(planned, tmp_path, measure=lambda *_: {'a': 1})
        assert [line['step'] for line in lines(tmp_path, 'light')] == [4]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_between_two_batches_of_a_validation(
    experiment, tmp_path, monkeypatch, number
):
    """One that follows no checkpoint: the step is saved after all."""
    batches, step = [], validate.loss_step

    def struck(*args, **settings):
        validates = step(*args, **settings)

        def batch(*args, **options):
            batches.append(1)
            os.kill(os.getpid(), number)
            return validates(*args, **options)

        return batch

    monkeypatch.setattr(validate, 'loss_step', struck)
    planned = short(experiment, every=100, validates=2)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f'stopped by {number.name} after step 2') as raised:
        loop.train(planned, tmp_path)
    assert raised.value.exit_code == 128 + number and signal.getsignal(number) == before
    assert len(batches) == 1
    assert on_disk(tmp_path) == [2] and not lines(tmp_path, 'validation')


def test_several_processes_ask_between_two_batches(experiment):
    """Where no process may stop by itself, `stop` is asked before each batch."""
    tokenizer = load_tokenizer(experiment.data)
    devices = meshes.make(MeshConfig())
    planned = changed(experiment, 'train', batch=1)
    params = initial_params(planned.model, planned.objective, jax.random.key(0))
    params = jax.device_put(params, layout.shardings(params, devices))
    validation = validate.Validation(planned, tokenizer, devices)
    asked = []
    with jax.set_mesh(devices):
        whole = validation(params, lambda: asked.append(1))
        assert len(asked) >= 3
        answers = iter([False, True])
        assert 0 < validation(params, lambda: next(answers))['bytes'] < whole['bytes']


@pytest.mark.parametrize(('module', 'where'), [(reading, 'with_tokenizer'), (run, 'train_step')])
def test_a_signal_before_the_first_step_ends_at_once(
    experiment, tmp_path, monkeypatch, module, where
):
    monkeypatch.setattr(module, where, kill_when(getattr(module, where)))
    with pytest.raises(Stopped, match='stopped by SIGTERM before a step was taken') as raised:
        loop.train(experiment, tmp_path)
    assert raised.value.exit_code == 128 + signal.SIGTERM
    assert on_disk(tmp_path) == []


@pytest.mark.slow
def test_a_run_that_left_no_checkpoint_blocks_nothing(experiment, tmp_path, monkeypatch):
    finish = loop._finish

    def dies(prepared, pending):
        if pending is not None and pending.step == 2:
            raise RuntimeError('dead')
        return finish(prepared, pending)

    monkeypatch.setattr(loop, '_finish', dies)
    planned = short(experiment, every=3, validates=0)
    with pytest.raises(UserError, match='dead'):
        loop.train(replace(planned, seed=1), tmp_path)
    assert [line['step'] for line in lines(tmp_path, 'train')] == [1]
    monkeypatch.setattr(loop, '_finish', finish)
    loop.train(planned, tmp_path)
    assert read_run(tmp_path)['experiment']['seed'] == 0
    (event,) = lines(tmp_path, 'event')
    assert 'ended before its first checkpoint' in event['text']
    assert len(list((tmp_path / 'tensorboard').iterdir())) == 1

    # Nor is one bound that died while its first checkpoint was on the way.
    killed, lost = tmp_path / 'killed', RuntimeError('dead')
    saves = checkpoint.ocp.training.Checkpointer, 'save_checkpointables_async'
    with mock.patch.object(*saves, side_effect=lost), pytest.raises(UserError, match='dead'):
        loop.train(replace(planned, seed=1), killed)
    assert [line['step'] for line in lines(killed, 'train')] == [1, 2, 3]
    loop.train(planned, killed)
    assert 'ended before its first checkpoint' in lines(killed, 'event')[0]['text']

    # One whose checkpoints were removed is no such run: its records are worth something.
    shutil.rmtree(tmp_path / 'checkpoints')
    with pytest.raises(UserError, match='a run that reached step 4, but none of its checkpoints'):
        loop.train(planned, tmp_path)
    assert [line['step'] for line in lines(tmp_path, 'train')] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_signal_before_the_last_step_saves_it(experiment, tmp_path, monkeypatch):
    finish = loop._finish

    def struck(prepared, pending):
        told = finish(prepared, pending)
        if pending is not None and pending.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return told

    monkeypatch.setattr(loop, '_finish', struck)
    planned = short(experiment, every=100, validates=4)
    with pytest.raises(Stopped, match='after step 4'):
        loop.train(planned, tmp_path)
    # Where each step is saved it is heard of as well.
    each = changed(short(experiment, every=1, validates=0), 'train', steps=9)
    with pytest.raises(Stopped, match='after step 4'):
        loop.train(each, tmp_path / 'each')
    assert on_disk(tmp_path) == [4]
    loop.train(planned, tmp_path)
    assert [line['step'] for line in lines(tmp_path, 'validation')] == [4]


@pytest.mark.parametrize(('validates', 'saved'), [(0, [3, 4]), (1, [2, 4])])
def test_checkpoints_by_the_clock(experiment, tmp_path, monkeypatch, validates, saved):
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    finish = loop._finish

    def a_minute_later(prepared, pending):
        if pending is not None:
            now[0] += 60
        return finish(prepared, pending)

    monkeypatch.setattr(loop, '_finish', a_minute_later)
    planned = changed(short(experiment, every=0, validates=validates), 'checkpoint', minutes=0.9)
    loop.train(planned, tmp_path)
    # A minute was over after step 1, which all know once the next is finished.
    assert saved_steps(tmp_path) == saved


def test_every_kth_step_is_saved_and_kept(experiment, tmp_path):
    planned = short(experiment, every=0, validates=0)
    loop.train(changed(planned, 'checkpoint', keep=1, keep_every=2), tmp_path)
    assert saved_steps(tmp_path) == [2, 4]


def test_data_that_fails_costs_no_step(experiment, tmp_path, monkeypatch):
    read = Loader.__next__

    def damaged(self):
        if self.seconds_waited and len(lines(tmp_path, 'train')) == 2:
            raise OSError(5, 'Input/output error', 'shard-3')
        return read(self)

    monkeypatch.setattr(Loader, '__next__', damaged)
    with pytest.raises(UserError) as raised:
        loop.train(short(experiment, every=100, validates=0), tmp_path)
    assert str(raised.value).startswith('reading the data of step 4 failed: OSError: [Errno 5]')
    assert on_disk(tmp_path) == [3]
    assert [line['step'] for line in lines(tmp_path, 'train')] == [1, 2, 3]


def test_a_step_that_fails_is_one_line(experiment, tmp_path, monkeypatch):
    finish = loop._finish

    def fails(prepared, pending):
        if pending is not None and pending.step == 3:
            raise RuntimeError('INTERNAL: a device is gone')
        return finish(prepared, pending)

    monkeypatch.setattr(loop, '_finish', fails)
    with pytest.raises(
        UserError, match=r'the training failed: RuntimeError: INTERNAL: a device is'
    ):
        loop.train(short(experiment, every=2, validates=0), tmp_path)
    # What it left on the devices is not known to be sound.
    assert on_disk(tmp_path) == [2]
    assert lines(tmp_path, 'event')[-1]['text'].startswith('the training failed')


@pytest.mark.slow
def test_a_second_run_in_the_directory_is_refused(experiment, tmp_path):
    """The lock is that of its holder, who is named, and not of the file."""
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "gone", "since": "2020"}')
    script = (
        f'import fcntl, sys; file = open({str(tmp_path / LOCK)!r}, "r+");'
        'fcntl.flock(file, fcntl.LOCK_EX); print("held", flush=True); sys.stdin.read()'
    )
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, '-c', script], stdin=pipe, stdout=pipe)
    assert holder.stdout.readline() == b'held\n'
    planned = short(experiment, every=0, validates=0)
    try:
        with pytest.raises(UserError) as raised:
            loop.train(planned, tmp_path)
        assert f'{tmp_path} is in use by process 1 on gone, since 2020: ' in str(raised.value)
        assert not (tmp_path / 'run.json').exists()
    finally:
        holder.kill()
        holder.communicate()
    loop.train(planned, tmp_path)
    told = json.loads((tmp_path / LOCK).read_text())
    assert told['pid'] == os.getpid() and told['host'] == socket.gethostname()
    assert datetime.fromisoformat(told['since']) <= datetime.now(UTC)
    loop.train(planned, tmp_path)  # given back


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (
            {'sample_tokens': 60, 'prompts': ('def main():',)},
            r'--evaluation.sample-tokens 60 after',
        ),
        ({'sample_tokens': 1, 'prompts': ('a',) + ('def ' * 70,)}, 'context of 64: shorten the'),
    ],
)
def test_samples_beyond_the_context_are_refused_before_anything_is_compiled(
    experiment, tmp_path, monkeypatch, settings, message
):
    monkeypatch.setattr(run, 'initial_state', None)
    with pytest.raises(UserError, match=message):
        loop.train(changed(experiment, 'evaluation', **settings), tmp_path)


def test_a_tokenizer_that_is_there_is_checked_before_the_data_is_prepared(
    experiment, tmp_path, monkeypatch
):
    load_tokenizer(experiment.data).save(tmp_path / 'tokenizer.model')
    monkeypatch.setattr(reading, 'open_sources', None)
    data = replace(
        experiment.data, tokenizer=TokenizerConfig(path=str(tmp_path / 'tokenizer.model'))
    )
    with pytest.raises(UserError, match='the tokenizer'):
        loop.train(changed(replace(experiment, data=data), 'model', vocab=300), tmp_path / 'run')


def test_a_split_that_is_not_there_is_told_before_a_tokenizer_is_trained(
    experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr(reading, 'with_tokenizer', None)
    with pytest.raises(UserError, match="no documents in the split 'valid'"):
        loop.train(changed(experiment, 'data', validation_split='valid'), tmp_path)


def test_a_signal_that_came_before_counts():
    """As one that comes while a checkpoint is awaited, just before a validation."""
    noted = Signals()
    noted.number = signal.SIGINT
    with noted.stopping('here', raises=False):
        pass  # several processes: they ask
    with pytest.raises(Stopped, match='stopped by SIGINT here') as raised, noted.stopping('here'):
        raise AssertionError('not before this')
    assert raised.value.exit_code == 130


COMPILED = """
import hashlib, sys
from llama_jax.train import signals

signals.GRACE_SECONDS = 0.2
with signals.caught() as caught:
    print('ready', file=sys.stderr, flush=True)
    if sys.argv[1] == 'nothing to lose':
        with caught.stopping('before it began'):
            hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
"""


@pytest.mark.parametrize(
    ('where', 'signals', 'code', 'line'),
    [
        ('nothing to lose', 'SIGTERM', 143, 'stopped by SIGTERM before it began'),
        ('much to lose', 'SIGTERM SIGINT', 130, 'ended at once by a second signal, SIGINT'),
    ],
)
def test_compiled_code_holds_up_no_signal(where, signals, code, line):
    """It runs for minutes in the main thread, which no exception of Python reaches there."""
    process = subprocess.Popen(
        [sys.executable, '-c', COMPILED, where], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == 'ready\n'
    for name in signals.split():
        time.sleep(0.7)
        assert process.poll() is None
        process.send_signal(getattr(signal, name))
    _, told = process.communicate(timeout=30)
    assert process.returncode == code and told == f'{line}\n'

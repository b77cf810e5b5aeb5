"""Runs of a tiny model on real text, from the first step to the last."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.loader import Loader
from llama_jax.data.sources import documents
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.train import loop, run
from llama_jax.train.experiment import digest, to_dict
from llama_jax.train.place import local_rows, place
from llama_jax.train.records import git_commit, read_metrics, read_run
from llama_jax.train.restore import load
from llama_jax.train.validate import Validation
from tests.train.conftest import changed

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


def lines(workdir, kind):
    return [line for line in read_metrics(workdir) if line['kind'] == kind]


def losses(workdir):
    by_step = {line['step']: line['loss'] for line in lines(workdir, 'train')}
    assert len(by_step) == len(lines(workdir, 'train'))  # none twice
    return by_step


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


@pytest.fixture(scope='session')
def finished(experiment, tmp_path_factory):
    """The directory of a finished run on one device."""
    workdir = tmp_path_factory.mktemp('finished') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'peak_flops', lambda device: (1e12, 'of a test'))
        patch.setattr(meshes, 'make', on_one_device(meshes.make))
        loop.train(experiment, workdir)
    return workdir


def on_one_device(make):
    """`mesh.make` which takes the first device where no mesh is asked for."""
    return lambda config: make(config, jax.devices()[:1] if config == MeshConfig() else None)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', on_one_device(meshes.make))


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run, for a test to go on with."""
    return shutil.copytree(finished, tmp_path / 'run')


def test_records_of_a_run(finished, experiment):
    facts = read_run(finished)
    assert facts['experiment'] == json.loads(json.dumps(to_dict(experiment)))
    assert facts['digest'] == digest(experiment)
    assert {'jax', 'flax', 'orbax-checkpoint', 'python'} <= facts['versions'].keys()
    assert facts['device'] == 'cpu' and facts['processes'] == 1
    has_history = git_commit(Path(__file__).parents[2]) is not None
    assert bool(facts['git_commit']) == has_history
    train = lines(finished, 'train')
    assert [line['step'] for line in train] == list(range(1, 21))
    assert train[-1]['loss'] < train[0]['loss'] - 1
    for line in train:
        assert line['tokens'] == line['step'] * 8 * 32
        assert line['flops'] == pytest.approx(line['tokens'] * facts['flops_per_token'])
        assert line['tokens_per_second'] > 0 and line['mfu'] > 0
        assert line['weight'] <= 8 * 32 and line['skipped'] == 0
    seconds = [line['seconds'] for line in train]
    assert seconds == sorted(seconds)
    assert [line['step'] for line in lines(finished, 'validation')] == [10, 20]
    assert (finished / 'tokenizer.model').exists()
    (events,) = (finished / 'tensorboard').iterdir()
    assert events.stat().st_size > 2000


def test_newest_and_best_checkpoints_are_kept(finished):
    by_step = {line['step']: line['bits_per_byte'] for line in lines(finished, 'validation')}
    assert min(by_step, key=by_step.get) == 20
    # When 20 was saved, 10 was the best of those validated.
    assert saved_steps(finished) == [10, 15, 20]


def test_bits_per_byte_equals_a_count_from_text_and_logits(finished, experiment):
    """Over the whole validation split: all its bytes; all logits at once, in float64."""
    tokenizer = load_tokenizer(experiment.data)
    devices = meshes.make(MeshConfig())
    model = load(finished, devices)
    with jax.set_mesh(devices):
        whole = changed(experiment, 'evaluation', batches=0)
        result = Validation(whole, tokenizer, devices)(model.params)
        with Loader(
            experiment.data,
            split='validation',
            tokenizer=tokenizer,
            maker=experiment.objective,
            batch=8,
            seq_len=32,
            seed=0,
            epochs=1,
        ) as loader:
            batches = list(loader)

        @jax.jit
        def logits(params, batch):
            return layers.bind(model.config, params)(
                batch['inputs'],
                position_BT=batch['positions'],
                segment_BT=batch['segments'],
                compute=experiment.compute,
            )[0]

        nats = 0.0
        for batch in batches:
            logit_BTV = np.asarray(logits(model.params, place(batch, devices)), np.float64)
            log_p_BTV = logit_BTV - np.log(np.exp(logit_BTV).sum(-1, keepdims=True))
            of_target_BT = np.take_along_axis(log_p_BTV, batch['targets'][..., None], -1)[..., 0]
            nats -= (batch['weights'] * of_target_BT).sum()
    n_bytes = sum(len(text.encode()) for text in documents(experiment.data, 'validation'))
    assert result['bytes'] == n_bytes
    assert result['bits_per_byte'] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-6)


@pytest.mark.parametrize('mesh', [MeshConfig(), MeshConfig(fsdp=8), MeshConfig(tensor=2)], ids=str)
def test_resumes_on_another_mesh_with_the_same_losses(copied, experiment, mesh, tmp_path):
    """From step 15, so that the steps to 20 can be compared."""
    reference = losses(copied)
    shutil.rmtree(copied / 'checkpoints' / '20')
    loop.train(replace(experiment, mesh=mesh), copied)
    again = losses(copied)
    assert list(again) == list(range(1, 21))
    assert {step: again[step] for step in range(1, 16)} == {
        step: reference[step] for step in range(1, 16)
    }
    tail = range(16, 21)
    if mesh == MeshConfig():
        assert [again[step] for step in tail] == [reference[step] for step in tail]
    np.testing.assert_allclose(
        [again[step] for step in tail], [reference[step] for step in tail], rtol=2e-5
    )


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_its_step_is_saved_again(copied, experiment):
    files = [p for p in (copied / 'checkpoints' / '20').rglob('*') if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    reference = losses(copied)
    loop.train(experiment, copied)
    assert losses(copied) == reference
    assert saved_steps(copied) == [15, 20]
    texts = [line['text'] for line in lines(copied, 'event')]
    assert any(text.startswith('checkpoint 20 is damaged') for text in texts)
    assert 'resumed from the checkpoint of step 15' in texts
    loop.train(experiment, copied)  # the new one is whole
    assert lines(copied, 'event')[-1]['text'] == 'resumed from the checkpoint of step 20'


@pytest.mark.slow
def test_a_finished_run_goes_on_when_it_is_given_more_steps(copied, experiment):
    with open(copied / 'metrics.jsonl', 'a') as file:
        file.write('{"kind": "train", "step": 21, "lo')  # cut off by a kill
    loop.train(changed(experiment, 'train', steps=22), copied)
    assert list(losses(copied)) == list(range(1, 23))
    assert any('train.steps: 20 -> 22' in line['text'] for line in lines(copied, 'event'))


def test_another_experiment_is_refused_by_its_fields(copied, experiment):
    other = changed(experiment, 'model', ffn=128)
    for _ in range(2):
        with pytest.raises(UserError, match=r'another experiment.* model\.ffn: 64 -> 128'):
            loop.train(other, copied)
        # Without its description the checkpoints themselves refuse.
        (copied / 'run.json').unlink(missing_ok=True)
    loop.train(experiment, copied)


def test_other_data_is_refused(copied, experiment):
    # The same settings, but the file has changed since.
    path = Path(experiment.data.sources[0].files[0])
    before = path.read_text()
    try:
        path.write_text(before + '\n' + json.dumps({'text': 'def new(): ...'}))
        with pytest.raises(UserError, match='the data is not what the run in .* began with: its'):
            loop.train(experiment, copied)
    finally:
        path.write_text(before)


def test_stops_when_too_many_steps_in_a_row_are_not_finite(experiment, tmp_path, monkeypatch):
    place = run.place

    def poisoned(batch, mesh):
        if batch['segments'].any():  # not the empty batch of the compilation
            batch = {**batch, 'weights': batch['weights'] * np.float32('nan')}
        return place(batch, mesh)

    monkeypatch.setattr(run, 'place', poisoned)
    with pytest.raises(UserError) as raised:
        loop.train(changed(experiment, 'train', max_nonfinite=3), tmp_path)
    message = str(raised.value)
    assert 'stopped at step 3' in message and '3 steps in a row' in message
    assert '\n' not in message
    assert str(tmp_path / 'nonfinite-batch-3-process-0.npz') in message
    with np.load(tmp_path / 'nonfinite-batch-3-process-0.npz') as kept:
        assert kept['inputs'].shape == (8, 32) and 'cursor' in kept
    texts = [line['text'] for line in lines(tmp_path, 'event')]
    assert [text.split(':')[0] for text in texts] == ['step 1', 'step 2', 'step 3']
    assert [line['loss'] for line in lines(tmp_path, 'train')] == [None] * 3  # JSON has no NaN


def test_lanes_of_a_process_are_the_rows_of_its_devices():
    """One process holds all rows, whatever the mesh."""
    for config in (MeshConfig(data=2), MeshConfig(fsdp=2, tensor=4), MeshConfig(data=8, fsdp=1)):
        assert local_rows(meshes.make(config), 16) == list(range(16))

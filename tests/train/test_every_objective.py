"""What holds for every objective: its golden losses, resuming bit for bit, any mesh."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import layout, mesh
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.loader import Loader
from llama_jax.data.record import Text
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.optim.adamw import OptimizerConfig
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train import loop, run
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
    from_dict,
    to_dict,
)
from llama_jax.train.loop import train
from llama_jax.train.records import read_metrics
from llama_jax.train.run import place
from llama_jax.train.step import abstract_state, initial_state, train_step
from tests.train.every import EVERY, VOCAB

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests/goldens/losses.json'
STEPS = 20


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The licence by paragraphs and bytes: the same on every machine and version."""
    path = tmp_path_factory.mktemp('licence')
    paragraphs = (ROOT / 'LICENSE').read_text().split('\n\n')
    lines = [json.dumps({'text': text}) for text in paragraphs]
    (path / 'licence.jsonl').write_text('\n'.join(lines))
    (path / 'records.jsonl').write_text('\n'.join(map(json.dumps, records(paragraphs))))
    bytes_tokenizer().save(path / 'bytes.model')
    return DataConfig(
        sources=(Source('text_files', files=(str(path / 'licence.jsonl'),)),),
        tokenizer=TokenizerConfig(path=str(path / 'bytes.model')),
    )


def records(paragraphs):
    """Every three words in a row, as every type of record: who reads one leaves the rest alone."""
    words = ' '.join(paragraphs).split()
    for a, b, c in zip(words[::3], words[1::3], words[2::3], strict=False):
        source, target = f'{a} {b}'[:20], c[:12]
        said = zip(('user', 'assistant'), (source, target), strict=True)
        yield {
            'messages': [{'role': role, 'content': text} for role, text in said],
            'source': source,
            'target': target,
            'text': source,
            'label': ('even', 'odd')[len(source) % 2],
        }


def of_records(data, **settings):
    file = str(Path(data.sources[0].files[0]).with_name('records.jsonl'))
    return dataclasses.replace(data, sources=(Source('records', files=(file,)),), **settings)


def experiment(name, data):
    objective, model = EVERY[name]
    assert bytes_tokenizer().vocab_size == VOCAB
    if objective.reads is not Text:
        data = of_records(data, chat='llama2' if objective.chats else None)
    return Experiment(
        name=name,
        model=model,
        data=data,
        objective=objective,
        train=TrainConfig(steps=STEPS, batch=8, seq_len=64, log_every=1),
        optimizer=OptimizerConfig(schedule=ScheduleConfig(peak=1e-2, warmup_steps=4)),
        evaluation=EvaluationConfig(every=0),
        checkpoint=CheckpointConfig(every=10, keep=1),
        mesh=MeshConfig(),
    )


@pytest.fixture
def one_device(monkeypatch):
    """Runs use one of the virtual devices: their programs compile sooner."""
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(run.meshes, 'make', lambda config: devices)


class Killed(BaseException):  # like a kill, nothing catches it
    pass


def told(workdir):
    """Losses and what goes with them of every step."""
    timed = ('seconds', 'tokens_per_second', 'mfu', 'seconds_waiting')
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in read_metrics(workdir)
        if line['kind'] == 'train'
    ]


QUICK = ('causal', 'spans encoder', 'contrastive dropout', 'instruct')


@pytest.mark.parametrize(
    'name',
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EVERY],
)
def test_losses_are_golden_and_a_killed_run_goes_on_bit_for_bit(name, data, tmp_path, monkeypatch):
    """Goldens are written by `LLAMA_JAX_WRITE_GOLDENS=1 python -m pytest tests/train`.

    Sums in another order (another jax, processor or thread count) move a loss by 1e-6 or so; a
    change of data, corruption, model or loss by far more.
    """
    config = experiment(name, data)
    whole = train(config, tmp_path / 'whole')
    lines = told(tmp_path / 'whole')
    losses = [line['loss'] for line in lines]
    assert len(losses) == STEPS and np.mean(losses[-3:]) < np.mean(losses[:3])

    finish = loop._finish

    def finish_or_die(prepared, pending):
        if pending is not None and pending.step == 13:
            raise Killed
        return finish(prepared, pending)

    with monkeypatch.context() as patch:
        patch.setattr(loop, '_finish', finish_or_die)
        with pytest.raises(Killed):
            train(config, tmp_path / 'broken')
    resumed = train(config, tmp_path / 'broken')
    events = [line for line in read_metrics(tmp_path / 'broken') if line['kind'] == 'event']
    assert [line['text'] for line in events] == ['resumed from the checkpoint of step 10']
    assert told(tmp_path / 'broken') == lines
    same = jax.tree.map(
        lambda a, b: np.array_equal(*map(np.asarray, (a, b))), whole.params, resumed.params
    )
    assert all(jax.tree.leaves(same))

    goldens = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get('LLAMA_JAX_WRITE_GOLDENS'):
        goldens[name] = losses
        GOLDEN.write_text(json.dumps(dict(sorted(goldens.items())), indent=1) + '\n')
    np.testing.assert_allclose(losses, goldens[name], rtol=2e-4)


@pytest.mark.parametrize('name', ['prefix', 'spans encoder', 'masked'])
def test_sharded_step_equals_the_step_of_one_device(name, data):
    """Loss and gradient of each way to predict tokens that test_step.py does not have; others are
    in tests/objectives."""
    objective, model = EVERY[name]
    model = dataclasses.replace(model, vocab=VOCAB + 1, dropout=0.0)  # a vocabulary in two parts
    gradient = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params: (updates, updates),
    )
    with Loader(
        data,
        split='train',
        tokenizer=bytes_tokenizer(),
        maker=objective,
        batch=8,
        seq_len=64,
        seed=0,
    ) as loader:
        batch = next(loader)
    one = mesh.make(MeshConfig(), jax.devices()[:1])
    host = initial_state(model, objective, gradient, seed=0, mesh=one)
    results = []
    for devices in (one, mesh.make(MeshConfig(tensor=2))):
        placed = layout.shardings(abstract_state(model, objective, gradient), devices)
        state = jax.tree.map(lambda x, to: jax.device_put(x.copy(), to), host, placed)
        step = train_step(
            model,
            objective,
            gradient,
            learning_rate=lambda step: 0.0,
            accumulate=1,
            compute=Compute(),
        )
        with jax.set_mesh(devices):
            state, metrics = step(state, place(batch, devices))
        results.append(jax.device_get((metrics['loss'], metrics['weight'], state.optimizer)))
    (loss, weight, gradients), (sharded_loss, sharded_weight, sharded) = results
    assert weight == sharded_weight > 0
    np.testing.assert_allclose(sharded_loss, loss, rtol=2e-6)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-8


@pytest.mark.parametrize('name', EVERY)
def test_settings_survive_their_record(name, data):
    config = experiment(name, data)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config

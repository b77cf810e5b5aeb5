"""A tiny model on real text, and one store of compiled programs for all tests of training."""

import inspect
import json
import os
import shutil
from dataclasses import replace

import jax
import pytest

from llama_jax import mesh as meshes
from llama_jax.data.config import DataConfig, Source
from llama_jax.model.config import ModelConfig
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train import loop, run
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
)
from llama_jax.train.records import read_metrics
from tests.data.corpus import MODULES

VOCAB = 512
MODEL = ModelConfig(
    vocab=VOCAB, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, context=64
)


@pytest.fixture(scope='session', autouse=True)
def caches(tmp_path_factory):
    """Prepared data, for this process and for those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        if 'LLAMA_JAX_CACHE' not in os.environ:
            patch.setenv('LLAMA_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(autouse=True)
def peak_is_not_measured(monkeypatch):
    monkeypatch.setattr(run, 'peak_flops', lambda device: (1e12, 'of a test'))


@pytest.fixture(scope='session')
def text(tmp_path_factory):
    """Functions and classes of the standard library, one a document."""
    path = tmp_path_factory.mktemp('text') / 'functions.jsonl'
    documents = [
        piece for module in MODULES[:6] for piece in inspect.getsource(module).split('\n\n\n')
    ]
    lines = [json.dumps({'text': document}) for document in documents if document.strip()]
    path.write_text('\n'.join(lines), 'utf-8')
    return path


@pytest.fixture(scope='session')
def experiment(text):
    """20 steps, a checkpoint every 5, a validation every 10."""
    return Experiment(
        name='tiny',
        model=MODEL,
        data=DataConfig(
            sources=(Source('text_files', files=(str(text),)),),
            tokenizer=TokenizerConfig(vocab=VOCAB),
        ),
        train=TrainConfig(steps=20, batch=8, seq_len=32, log_every=1),
        optimizer=AdamW(schedule=ScheduleConfig(peak=1e-2, warmup_steps=4)),
        evaluation=EvaluationConfig(every=10, batches=4),
        checkpoint=CheckpointConfig(every=5, keep=2),
    )


def changed(experiment, section, **values):
    """The experiment with other settings in one section."""
    return replace(experiment, **{section: replace(getattr(experiment, section), **values)})


MAKE_MESH = meshes.make


def one_device(config):
    """`mesh.make` of one device, whatever it is asked for."""
    return MAKE_MESH(config, jax.devices()[:1])


def scheduled(experiment, **values):
    """The experiment with another schedule."""
    schedule = replace(experiment.optimizer.schedule, **values)
    return changed(experiment, 'optimizer', schedule=schedule)


def events(workdir):
    """What a run has said."""
    return [line['text'] for line in read_metrics(workdir) if line['kind'] == 'event']


@pytest.fixture(scope='session')
def short(experiment):
    """8 steps, checkpoints and validations of the steps 4 and 8."""
    short = changed(experiment, 'train', steps=8)
    short = changed(short, 'evaluation', every=4, batches=1)
    short = scheduled(short, peak=1e-2, warmup_steps=2)
    return changed(short, 'checkpoint', every=4, keep=3)


@pytest.fixture(scope='session')
def short_run(short, tmp_path_factory):
    """The directory of that run, finished."""
    workdir = tmp_path_factory.mktemp('short') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'peak_flops', lambda device: (1e12, 'of a test'))
        patch.setattr(meshes, 'make', one_device)
        loop.train(short, workdir)
    return workdir


@pytest.fixture
def copied_run(short_run, tmp_path):
    """The same, for a test to go on with."""
    return shutil.copytree(short_run, tmp_path / 'run')

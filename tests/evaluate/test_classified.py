"""Classes of texts by a run that was trained to classify."""

import dataclasses
import json

import numpy as np
import pytest

from llama_jax.data.config import DataConfig, Source
from llama_jax.errors import UserError
from llama_jax.evaluate.classifier import classified
from llama_jax.generate.finite import NotFiniteError
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.classify import Classification
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train import restore, run
from llama_jax.train.experiment import CheckpointConfig, EvaluationConfig, Experiment, TrainConfig
from llama_jax.train.labels import labelled
from llama_jax.train.loop import train
from tests.train.conftest import one_device

LABELS = ('fruit', 'tool')
WORDS = {'fruit': ('apple', 'pear', 'plum', 'fig'), 'tool': ('saw', 'drill', 'axe', 'rasp')}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('classes')
    rows = [
        {'text': f'{word} {i}', 'label': label}
        for i in range(8)
        for label, words in WORDS.items()
        for word in words
    ]
    (path / 'words.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    bytes_tokenizer().save(path / 'bytes.model')
    experiment = Experiment(
        name='classes',
        model=ModelConfig(
            vocab=0, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, ffn=64, context=64
        ),
        data=DataConfig(
            sources=(Source('records', files=(str(path / 'words.jsonl'),)),),
            tokenizer=TokenizerConfig(path=str(path / 'bytes.model')),
        ),
        objective=Classification(pool='mean'),
        train=TrainConfig(steps=40, batch=8, seq_len=64, log_every=40),
        optimizer=AdamW(schedule=ScheduleConfig(peak=1e-2, warmup_steps=4)),
        evaluation=EvaluationConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
        compute=Compute(precision='float32'),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LLAMA_JAX_CACHE', str(path / 'cache'))
        patch.setattr(run, 'peak_flops', lambda device: (1e12, 'of a test'))
        patch.setattr(run.meshes, 'make', one_device)
        train(labelled(experiment), path / 'run')
    return restore.load(path / 'run', one_device(MeshConfig()))


@pytest.mark.slow
def test_classes_of_new_texts(trained):
    """In their order, whatever stands beside them in a batch."""
    devices = one_device(MeshConfig())
    texts = ['pear 9', 'drill 3', 'axe and saw', 'plum', 'x' * 100 + ' fig']
    found = classified(trained, texts, devices, batch=2)
    assert found.labels == LABELS and found.probability_NC.shape == (5, 2)
    assert found.best[:4] == ['fruit', 'tool', 'tool', 'fruit']
    np.testing.assert_allclose(found.probability_NC.sum(1), 1, rtol=1e-6)
    for text, probability_C in zip(texts, found.probability_NC, strict=True):
        alone = classified(trained, [text], devices, batch=2).probability_NC[0]
        np.testing.assert_allclose(alone, probability_C, rtol=1e-5)
    pairs = classified(trained, [('pear', 'drill'), ('pear', 'fig')], devices, batch=2)
    assert pairs.probability_NC[0, 1] > pairs.probability_NC[1, 1]
    assert classified(trained, [], devices).probability_NC.shape == (0, 2)


def test_what_cannot_be_classified_is_refused(trained):
    devices = one_device(MeshConfig())
    with pytest.raises(UserError, match='text 1: text is empty'):
        classified(trained, ['pear', ' '], devices)
    with pytest.raises(UserError, match='text 0: other is empty'):
        classified(trained, [('pear', '')], devices)
    other = dataclasses.replace(trained.experiment, objective=CausalLM())
    with pytest.raises(UserError, match='trained by CausalLM, and has no head that classifies'):
        classified(trained._replace(experiment=other), ['pear'], devices)
    broken = trained._replace(extra={name: x * np.nan for name, x in trained.extra.items()})
    with pytest.raises(NotFiniteError, match='the model gives'):
        classified(broken, ['pear'], devices)

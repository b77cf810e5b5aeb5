"""A trained head asked for labels, against the objective's own loss."""

import json

import jax
import numpy as np
import pytest

from llama_jax.data.record import Labelled
from llama_jax.errors import UserError
from llama_jax.evaluate import ask, task
from llama_jax.evaluate.classifier import Classifier
from llama_jax.evaluate.subject import Subject
from llama_jax.generate.programs import Programs
from llama_jax.model import layers
from llama_jax.objectives.classify import Classification
from llama_jax.train.restore import Trained
from tests.evaluate.conftest import COMPUTE, MODEL, experiment

LABELS = ('bad', 'good', 'neither')


@pytest.fixture(scope='module')
def subject(tokenizer, params, mesh):
    objective = Classification(labels=LABELS)
    rng = np.random.default_rng(0)
    extra = {
        'head_DC': jax.device_put(
            rng.normal(size=(MODEL.dim, 3)).astype(np.float32), jax.NamedSharding(mesh, jax.P())
        )
    }
    trained = Trained(experiment(objective), params, extra, tokenizer, 0)
    programs = Programs(
        MODEL, params, mesh=mesh, compute=COMPUTE, end_ids=(tokenizer.eos_id,), pad_id=0
    )
    return Subject('run', programs, tokenizer, (tokenizer.bos_id,), None, Classifier(trained, mesh))


def asked(tmp_path, items):
    path = tmp_path / 'reviews.jsonl'
    path.write_text(''.join(json.dumps(item) + '\n' for item in items))
    return task.load(path)


def test_labels_of_texts_and_pairs(tmp_path, subject, tokenizer, params, mesh):
    items = [
        {'text': f'number {i} 好', 'other': 'why ' * i or '?', 'label': LABELS[i % 3]}
        for i in range(6)
    ]
    found = ask.ask(subject, asked(tmp_path, items))
    objective = Classification(labels=LABELS)
    token_BT, last = np.zeros((8, 40), np.int32), []
    for row, item in enumerate(items):
        record = Labelled(item['text'], item['label'], item['other'])
        parts = objective.encoded(record, vocabulary=tokenizer, chat=None).parts
        ids = np.concatenate([*parts, [tokenizer.eos_id]])
        token_BT[row, : len(ids)] = ids
        last.append(len(ids) - 1)
    # No token sees what pads the row behind it.
    forward = jax.jit(lambda params: layers.bind(MODEL, params).features(token_BT, compute=COMPUTE))
    with jax.set_mesh(mesh):
        x_BTD = np.asarray(forward(params)[0])
    head_DC = np.asarray(subject.classifier._trained.extra['head_DC'])
    for row, (item, example) in enumerate(zip(items, found.examples, strict=True)):
        logit_C = x_BTD[row, last[row]] @ head_DC
        log_C = logit_C - np.log(np.exp(logit_C).sum())
        np.testing.assert_allclose(example['log_p'], log_C, atol=1e-4)
        assert example['chosen']['acc'] == int(np.argmax(log_C))
        assert example['scores']['acc'] == float(LABELS[np.argmax(log_C)] == item['label'])
    result = found.result()
    assert result['metrics']['acc']['value'] == np.mean(found.scores['acc'])
    assert [row['n'] for row in result['report']['classes'].values()] == [2, 2, 2]


def test_what_cannot_be_asked(tmp_path, subject):
    items = [{'text': 'x', 'label': 'good'}, {'text': 'y', 'label': 'great'}]
    with pytest.raises(UserError, match="line 2: the head does not know the label 'great'"):
        ask.ask(subject, asked(tmp_path, items))
    with pytest.raises(UserError, match='1 of 2 prompts are longer than the 64 tokens'):
        ask.ask(subject, asked(tmp_path, [items[0], {'text': 'word ' * 99, 'label': 'bad'}]))
    none = Subject('model', subject.programs, subject.vocabulary)
    with pytest.raises(UserError, match='model was not trained by Classification'):
        ask.ask(none, asked(tmp_path, items[:1]))
    with pytest.raises(UserError, match='line 1: a text is empty'):
        asked(tmp_path, [{'text': ' ', 'label': 'good'}])

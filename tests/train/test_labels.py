"""Labels of a classification from the data."""

import json
from dataclasses import replace

import pytest

from llama_jax.data.config import DataConfig, Source
from llama_jax.errors import UserError
from llama_jax.objectives.classify import Classification, shortened
from llama_jax.train.experiment import Experiment, TrainConfig
from llama_jax.train.labels import labelled
from tests.train.conftest import MODEL


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A function from rows of a file to an experiment on them."""
    monkeypatch.setenv('LLAMA_JAX_CACHE', str(tmp_path / 'cache'))

    def begun(rows, **objective):
        path = tmp_path / 'data.jsonl'
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows), 'utf-8')
        source = Source('text_files', files=(str(path),), split='all')
        return Experiment(
            name='labels',
            model=MODEL,
            data=DataConfig(sources=(source,)),
            train=TrainConfig(steps=1, batch=8, seq_len=32),
            objective=Classification(**objective),
        )

    return begun


ROWS = [{'text': f'text {i}', 'label': '差' if i % 3 else 'good'} for i in range(12)]


def test_labels_are_those_of_the_data_sorted(begun):
    experiment = begun([*ROWS, {'text': 'nobody labelled this'}])
    assert labelled(experiment).objective == Classification(labels=('good', '差'))
    balanced = labelled(begun(ROWS, balance='balanced')).objective
    assert balanced.class_weights == (12 / (2 * 4), 12 / (2 * 8))
    assert labelled(replace(experiment, objective=balanced)).objective is balanced
    given = begun(ROWS, labels=('x', 'y'))
    assert labelled(given) is given  # who does not fit is told when the data is read


def test_data_without_two_labels_is_refused(begun):
    with pytest.raises(UserError, match="have the label 'good': there is nothing to tell apart"):
        labelled(begun([row for row in ROWS if row['label'] == 'good']))
    with pytest.raises(
        UserError, match=r'has a text and a label \(data.jsonl:\d: label is missing'
    ):
        labelled(begun([{'text': str(i)} for i in range(3)]))


def test_one_text_is_cut_where_the_row_ends():
    assert [len(part) for part in shortened(([0] * 9,), 5)] == [5]
    assert [len(part) for part in shortened(([0] * 5,), 5)] == [5]

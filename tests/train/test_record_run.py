"""A run on records: resumed it is the run that never stopped, and its data can be looked at."""

import json
import shutil
from dataclasses import replace

import jax
import pytest

from llama_jax import mesh as meshes
from llama_jax.data.config import DataConfig, Source
from llama_jax.errors import UserError
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.check_data import check_data
from llama_jax.train.experiment import EvaluationConfig
from llama_jax.train.loop import train
from llama_jax.train.records import read_metrics
from llama_jax.train.show import show_examples
from tests.train.conftest import changed, one_device


@pytest.fixture(scope='module')
def pairs(short, tmp_path_factory):
    """6 steps on pairs, which are validated, with a checkpoint of steps 3 and 6."""
    path = tmp_path_factory.mktemp('pairs')
    for name, n in (('train', 60), ('held', 9)):
        records = [{'source': f'{name} {i}', 'target': f'{i}' * (1 + i % 7)} for i in range(n)]
        (path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, records)), 'utf-8')
    found = [
        Source('text_files', files=(str(path / f'{name}.jsonl'),), split='all')
        for name in ('train', 'held')
    ]
    data = DataConfig(
        sources=(found[0],), validation=(found[1],), tokenizer=TokenizerConfig(kind='bytes')
    )
    run = replace(
        changed(short, 'train', steps=6),
        data=data,
        objective=SequenceToSequence(),
        evaluation=EvaluationConfig(every=3),
    )
    return changed(run, 'checkpoint', every=3)


def losses(workdir):
    return {
        (line['kind'], line['step']): line['loss']
        for line in read_metrics(workdir)
        if 'loss' in line
    }


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)
    train(pairs, tmp_path / 'whole')
    wanted = losses(tmp_path / 'whole')
    assert wanted['validation', 6] < wanted['validation', 3]
    shutil.copytree(tmp_path / 'whole', tmp_path / 'part')
    shutil.rmtree(tmp_path / 'part' / 'checkpoints' / '6')
    train(pairs, tmp_path / 'part')
    assert losses(tmp_path / 'part') == wanted
    events = [line['text'] for line in read_metrics(tmp_path / 'part') if line['kind'] == 'event']
    assert 'resumed from the checkpoint of step 3' in events


def test_data_is_checked_without_training(pairs, capsys):
    check_data(pairs)
    out = capsys.readouterr().out
    assert 'train of train:\n  60 records, of which 0 bad and 0 too long; ' in out
    longest = max(len(f'<train {i}' + f'{i}' * (1 + i % 7)) for i in range(60))
    assert 'positions: median ' in out and f', longest {longest} (a row has 32)' in out
    assert 'an epoch of validation: ' in out and '% padding; ' in out
    tight = changed(pairs, 'train', seq_len=12)
    with pytest.raises(UserError) as refused:
        check_data(tight)
    assert str(refused.value).startswith('a run would refuse ')
    assert str(refused.value).endswith('or set --data.too-long drop or truncate')
    check_data(changed(tight, 'data', too_long='drop'))


def test_examples_are_shown_by_their_loss(pairs, capsys):
    show_examples(pairs, 2)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5 and out[1].startswith('example 1: train.jsonl:')
    number = int(out[1].partition(':')[2].partition(':')[2].partition(',')[0]) - 1
    assert out[2] == f'  text <s>train {number}⟦{f"{number}" * (1 + number % 7)}</s>⟧'
    with pytest.raises(UserError, match='--show-examples 0: give the number of examples'):
        show_examples(pairs, 0)


def test_what_is_no_record_is_refused_before_anything_is_compiled(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'jit', None)
    (tmp_path / 'c.jsonl').write_text('{"messages": []}\n')
    source = Source('text_files', files=(str(tmp_path / 'c.jsonl'),), split='all')
    with pytest.raises(
        UserError, match=r'none of 1 records is .* c.jsonl:1: nothing asked and answered .*names.$'
    ):
        train(changed(pairs, 'data', sources=(source,)), tmp_path / 'run')

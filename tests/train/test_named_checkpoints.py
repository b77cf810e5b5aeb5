"""Checkpoints by their step, and runs that begin with the parameters of another."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.train import loop, reading, run, validate
from llama_jax.train.checkpoint import SCORES
from llama_jax.train.records import read_run
from llama_jax.train.restore import Mean, Named, load, named
from llama_jax.train.start import check_start
from tests.train.conftest import changed, events, one_device

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


def embedding(run):
    return np.asarray(load(run, one_device(MeshConfig())).params['embed_VD'])


def test_a_checkpoint_is_named_by_its_step_or_as_the_best(short_run, copied_run):
    loaded = {at: load(f'{short_run}{at}', one_device(MeshConfig())) for at in ('', '@4', '@8')}
    assert {at: trained.step for at, trained in loaded.items()} == {'': 8, '@4': 4, '@8': 8}
    assert not np.array_equal(loaded['@4'].params['embed_VD'], loaded['@8'].params['embed_VD'])
    np.testing.assert_array_equal(embedding(short_run), embedding(f'{short_run}@8'))
    # The best is not the newest: as if step 8 had been validated worse.
    scores = json.loads((copied_run / SCORES).read_text())
    scores['scores']['8'] = 99.0
    (copied_run / SCORES).write_text(json.dumps(scores))
    assert load(f'{copied_run}@best', one_device(MeshConfig())).step == 4
    assert load(f'{short_run}@best', one_device(MeshConfig())).step == 8
    (copied_run / SCORES).unlink()
    with pytest.raises(UserError, match=r'was validated.* such as .*@8 \(there are 4, 8\)'):
        load(f'{copied_run}@best', one_device(MeshConfig()))


def test_a_mean_is_of_the_newest_checkpoints(short_run):
    mean = load(f'{short_run}@mean:2', one_device(MeshConfig()))
    assert mean.step == 8 and mean.identity['mean'] == 2
    four, eight = (embedding(f'{short_run}@{step}') for step in (4, 8))
    np.testing.assert_allclose(mean.params['embed_VD'], (four + eight) / 2, rtol=1e-6)
    with pytest.raises(UserError, match='has 1 checkpoints up to step 4, not 2'):
        load(Named(short_run, Mean(2, until=4)), one_device(MeshConfig()))
    assert str(named('a@mean:2').step) == 'mean:2'  # as the names of files have it


def test_without_a_likelihood_the_lowest_loss_is_the_best():
    assert validate.score({'loss': 3.0, 'bits_per_byte': 1.5}) == 1.5
    assert validate.score({'loss': 3.0}) == 3.0
    assert validate.score({'loss': math.nan}) is None
    assert validate.score({'loss': 3.0, 'bits_per_byte': math.inf}) is None


@pytest.mark.parametrize(
    'at, message',
    [
        ('@400', 'has no checkpoint of step 400: there are those of 4, 8'),
        ('@latest', 'after @ comes the number of a step, best, or mean:N'),
        ('@', 'after @ comes the number of a step, best, or mean:N'),
        ('@mean:', 'after @ comes the number of a step, best, or mean:N'),
        ('@mean:1', 'a mean is of 2 checkpoints or more'),
        ('@mean:3', 'has 2 checkpoints, not 3: take fewer, or train with --checkpoint.keep 3'),
        ('/nowhere@4', 'holds no run'),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told(short_run, at, message):
    with pytest.raises(UserError, match=message):
        load(f'{short_run}{at}', one_device(MeshConfig()))


def test_a_directory_with_an_at_in_its_name_is_a_directory(short_run, tmp_path):
    shutil.copytree(short_run, tmp_path / 'run@4')
    assert load(tmp_path / 'run@4', one_device(MeshConfig())).step == 8
    assert load(f'{tmp_path}/run@4@4', one_device(MeshConfig())).step == 4
    assert named('a@b/c').workdir == Path('a@b/c')
    assert named('~/runs/a@best') == (Path.home() / 'runs/a', 'best')


def test_a_named_checkpoint_that_is_damaged_is_told_not_passed_over(copied_run):
    files = [path for path in (copied_run / 'checkpoints/8/params').rglob('*') if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(UserError, match=r'checkpoint 8 in .* is damaged .* another of 4, 8'):
        load(f'{copied_run}@8', one_device(MeshConfig()))
    assert load(copied_run, one_device(MeshConfig())).step == 4


def test_a_run_begins_with_any_step_of_another_and_a_longer_context(short_run, short, tmp_path):
    longer = changed(replace(short, start=f'{short_run}@4'), 'model', context=128)
    prepared = run.prepare(longer, tmp_path)
    with prepared:
        np.testing.assert_array_equal(
            prepared.state.params['embed_VD'], embedding(f'{short_run}@4')
        )
        assert int(prepared.state.step) == 0
    assert events(tmp_path) == [
        f'begun with the parameters of {short_run}@4, step 4',
        'another setting than there: model.context: 64 -> 128',
    ]


@pytest.mark.parametrize(
    'start, values, message',
    [
        ('', {'ffn': 32}, 'differs in ffn: 64 -> 32: give --model.ffn as it has'),
        ('@5', {}, 'has no checkpoint of step 5'),
        ('/nowhere', {}, 'holds no run'),
    ],
)
def test_a_start_that_does_not_fit_is_told_before_anything_is_made(
    short_run, short, monkeypatch, tmp_path, start, values, message
):
    monkeypatch.setattr(reading, 'with_tokenizer', lambda config: 1 / 0)
    other = changed(replace(short, start=f'{short_run}{start}'), 'model', **values)
    with pytest.raises(UserError, match=message):
        loop.train(other, tmp_path)


def test_learned_positions_do_not_grow(copied_run, short, tmp_path):
    facts = read_run(copied_run)
    facts['experiment']['model']['positions'] = 'learned'
    (copied_run / 'run.json').write_text(json.dumps(facts))
    start = changed(replace(short, start=str(copied_run)), 'model', positions='learned')
    check_start(start)
    with pytest.raises(UserError, match='a table of 64 rows: set --model.context 64'):
        check_start(changed(start, 'model', context=128))

"""Runs that learn from preferences: the reference is computed once, kept, and read again."""

import dataclasses
import shutil

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.objectives.preference import DPO
from llama_jax.train import loop, reference, run
from tests.train import preferring
from tests.train.conftest import one_device
from tests.train.preferring import lines


@pytest.fixture(scope='module')
def dpo(tmp_path_factory):
    return preferring.experiment(DPO(), tmp_path_factory.mktemp('pairs'))


@pytest.fixture(scope='module')
def whole(dpo, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'peak_flops', lambda device: (1e12, 'of a test'))
        patch.setattr(run.meshes, 'make', one_device)
        loop.train(dpo, workdir)
    return workdir


@pytest.fixture(autouse=True)
def of_one_device(monkeypatch):
    monkeypatch.setattr(run.meshes, 'make', one_device)


@pytest.mark.slow
def test_the_first_loss_is_ln_2_and_held_out_pairs_are_told_apart(whole):
    steps = lines(whole, 'train')
    assert steps[0]['loss'] == pytest.approx(np.log(2), abs=1e-7) and steps[0]['margin'] == 0
    assert steps[-1]['loss'] < 0.69 and steps[-1]['reward_chosen'] != 0
    (held_out,) = lines(whole, 'validation')
    assert {'accuracy', 'margin', 'reward_chosen', 'log_prob_rejected'} <= held_out.keys()
    assert held_out['accuracy'] > 0.5 and held_out['loss'] < np.log(2)


def test_losses_are_golden(whole):
    preferring.assert_golden('dpo', whole)


@pytest.mark.slow
def test_a_run_that_goes_on_reads_the_reference_and_is_as_the_whole(
    dpo, whole, tmp_path, monkeypatch
):
    resumed = shutil.copytree(whole, tmp_path / 'run')
    shutil.rmtree(resumed / 'checkpoints' / '20')
    computed = []
    monkeypatch.setattr(
        reference.References, '_computed', lambda *args: computed.append(args) or 1 / 0
    )
    loop.train(dpo, resumed)
    assert not computed
    assert lines(resumed, 'train') == lines(whole, 'train')
    assert lines(resumed, 'validation')[-1] == lines(whole, 'validation')[-1]


@pytest.mark.slow
def test_a_reference_that_is_gone_is_computed_of_the_beginning_again(dpo, whole, tmp_path):
    resumed = shutil.copytree(whole, tmp_path / 'run')
    shutil.rmtree(resumed / 'checkpoints' / '20')
    shutil.rmtree(resumed / reference.DIRECTORY)
    loop.train(dpo, resumed)
    assert lines(resumed, 'train') == lines(whole, 'train')
    kept = {path.name: np.load(path) for path in (whole / reference.DIRECTORY).iterdir()}
    again = {path.name: np.load(path) for path in (resumed / reference.DIRECTORY).iterdir()}
    assert kept.keys() == again.keys() and len(kept) == 2
    for name, known_RC in kept.items():
        np.testing.assert_array_equal(known_RC, again[name])
        assert np.isfinite(known_RC).all() and known_RC.shape[1] == 2 and (known_RC < 0).all()


def test_another_reference_than_that_of_the_beginning_is_refused(dpo, whole, tmp_path):
    resumed = shutil.copytree(whole, tmp_path / 'run')
    shutil.rmtree(resumed / 'checkpoints' / '20')
    for path in (resumed / reference.DIRECTORY).iterdir():
        np.save(path, np.load(path) * 1.01)
    with pytest.raises(UserError, match='not that with which the run in .* began'):
        loop.train(dpo, resumed)


def test_a_reference_without_adapters_needs_some(dpo, tmp_path):
    off = dataclasses.replace(dpo, objective=DPO(reference='adapters_off'))
    with pytest.raises(UserError, match='set tune to LoRA') as error:
        loop.train(off, tmp_path / 'run')
    assert '\n' not in str(error.value)


def test_a_damaged_reference_is_told(dpo, whole, tmp_path):
    resumed = shutil.copytree(whole, tmp_path / 'run')
    (path, *_) = sorted((resumed / reference.DIRECTORY).iterdir())
    path.write_bytes(path.read_bytes()[:100])
    more = dataclasses.replace(dpo, train=dataclasses.replace(dpo.train, steps=22))
    with pytest.raises(UserError, match='damaged .*delete it'):
        loop.train(more, resumed)

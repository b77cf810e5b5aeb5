"""Runs that train adapters, or a head, beside weights that stay: begun, killed, resumed, loaded."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax import trees
from llama_jax.model.tune import Full, LoRA
from llama_jax.train import loop, restore
from llama_jax.train.checkpoint import numpy_tree
from llama_jax.train.run import prepare
from tests.train.conftest import changed, one_device, scheduled

TUNE = LoRA(rank=2, alpha=8.0, targets=('attention', 'down_FD'), dropout=0.25)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


@pytest.fixture(scope='module')
def tuned(short, short_run):
    """4 steps upon a run, a checkpoint of 2 and of 4."""
    tuned = changed(changed(short, 'train', steps=4), 'evaluation', every=0)
    tuned = changed(scheduled(tuned, peak=1e-2, warmup_steps=1), 'checkpoint', every=2)
    return replace(tuned, start=f'{short_run}@8', tune=TUNE)


@pytest.fixture(scope='module')
def tuned_run(tuned, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('tuned') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, 'make', one_device)
        loop.train(tuned, workdir)
    return workdir


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, numpy_tree(one), numpy_tree(other))


def test_the_base_stays_and_a_run_begins_as_it(tuned, short_run, tmp_path):
    base = restore.load(short_run, one_device(tuned.mesh))
    full = replace(tuned, tune=Full())
    losses = []
    for i, experiment in enumerate((full, replace(tuned, tune=replace(TUNE, dropout=0.0)))):
        with prepare(experiment, tmp_path / str(i)) as run:
            batch = run.place(next(run.loader))
            run.state, metrics = run.step(run.state, batch)
            losses.append(float(metrics['loss']))
            state = run.state
    assert losses[0] == losses[1], 'bit for bit'
    same(state.frozen, base.params)
    moved = dict(trees.named(state.params))
    assert all(np.any(np.asarray(x)) for x in moved.values()), 'every factor moves'
    assert {name.split('.')[-2] for name in moved} == {
        'q_DNH',
        'k_DKH',
        'v_DKH',
        'out_NHD',
        'down_FD',
    }


def test_killed_and_resumed_bit_for_bit_and_small(tuned, tuned_run, tmp_path):
    whole = restore.load(tuned_run, one_device(tuned.mesh))
    killed = shutil.copytree(tuned_run, tmp_path / 'run')
    shutil.rmtree(killed / 'checkpoints' / '4')
    state = loop.train(tuned, killed)
    same(state.evaluated, whole.params)
    size = sum(p.stat().st_size for p in (tuned_run / 'checkpoints' / '4').rglob('*'))
    full = trees.n_bytes(state.frozen)
    assert 3 * trees.n_bytes(state.params) < full / 2
    assert size < full, 'three arrays for each factor, and nothing of the base'

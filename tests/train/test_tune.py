"""Runs that train adapters, or a head, beside weights that stay: begun, killed, resumed, loaded."""

import shutil
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax import trees
from llama_jax.errors import UserError
from llama_jax.model.tune import Frozen, Full, LoRA
from llama_jax.objectives.causal import CausalLM
from llama_jax.train import loop, restore
from llama_jax.train.checkpoint import numpy_tree
from llama_jax.train.records import read_metrics
from llama_jax.train.run import prepare
from tests.train.conftest import changed, one_device, scheduled

TUNE = LoRA(rank=2, alpha=8.0, targets=('attention', 'down_FD'), dropout=0.25)


@dataclass(frozen=True)
class Shifted(CausalLM):
    """With a parameter of its own, which the loss falls with."""

    def extra(self, model, key):
        return {'shift_D': jnp.zeros(model.dim)}

    def loss(self, model, batch, *, extra, compute, key, context):
        loss = super().loss(model, batch, extra={}, compute=compute, key=key)
        return loss._replace(total=loss.total + loss.weight * extra['shift_D'].sum())


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


@pytest.mark.slow
def test_what_is_trained_upon_a_mean_goes_on_upon_it_and_refuses_another(
    tuned, short_run, tmp_path
):
    shutil.copytree(short_run, tmp_path / 'begun')
    upon = replace(tuned, start=f'{tmp_path}/begun@mean:2')
    loop.train(upon, tmp_path / 'run')
    found, mean, newest = (
        np.asarray(restore.load(run, one_device(meshes.MeshConfig())).params['embed_VD'])
        for run in (tmp_path / 'run', f'{short_run}@mean:2', short_run)
    )
    np.testing.assert_array_equal(found, mean)
    assert np.any(found != newest)
    loop.train(changed(upon, 'train', steps=6), tmp_path / 'run')
    shutil.rmtree(tmp_path / 'begun/checkpoints/4')
    with pytest.raises(UserError, match='has 1 checkpoints up to step 8, not 2'):
        restore.load(tmp_path / 'run', one_device(meshes.MeshConfig()))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, numpy_tree(one), numpy_tree(other))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_base_of_integers_is_validated_sampled_and_loaded(tuned, tmp_path):
    """In bfloat16, where no float32 copy of the base is kept."""
    tune = replace(TUNE, base='int8')
    short = changed(replace(tuned, tune=tune), 'compute', precision='bfloat16')
    short = changed(short, 'evaluation', every=4, batches=1, prompts=('def',), sample_tokens=4)
    state = loop.train(short, tmp_path / 'run')
    block = state.frozen['blocks']['mlp']
    assert block['up_DF'].value.dtype.name == 'int8', 'a weight without adapters as well'
    assert state.frozen['embed_VD'].dtype.name == 'bfloat16'
    assert state.frozen['norm']['scale_D'].dtype.name == 'float32'
    samples = [line for line in read_metrics(tmp_path / 'run') if line['kind'] == 'sample']
    assert {line['step'] for line in samples} == {0, 4}
    found = restore.load(tmp_path / 'run', one_device(tuned.mesh)).params
    w = found['blocks']['mlp']['down_FD']
    same(
        (w.base, w.a, w.b),
        tuple(
            getattr(state.evaluated['blocks']['mlp']['down_FD'], name)
            for name in ('base', 'a', 'b')
        ),
    )
    assert found['embed_VD'].dtype.name == 'float32', 'as it is there'


def test_a_head_alone(tuned, tmp_path):
    """Parameters of the objective are trained; those of the model are those of the start."""
    shifted = replace(tuned, tune=Frozen(), objective=Shifted())
    with prepare(shifted, tmp_path / 'run') as run:
        before = jax.tree.map(np.array, run.state.frozen)
        run.state, _ = run.step(run.state, run.place(next(run.loader)))
        same(run.state.frozen, before)
        assert list(run.state.params) == ['objective'] and np.any(
            run.state.params['objective']['shift_D']
        )
    assert len(jax.tree.leaves(before)) > 9

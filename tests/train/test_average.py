"""Averaged parameters, small learning rates, and runs that end early."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.objectives.causal import CausalLM
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.base import optimizer
from llama_jax.optim.spikes import FIRST
from llama_jax.train import loop, run
from llama_jax.train.checkpoint import Checkpoints
from llama_jax.train.experiment import check
from llama_jax.train.place import place
from llama_jax.train.records import read_metrics
from llama_jax.train.restore import load
from llama_jax.train.step import averaging, initial_state, train_step
from llama_jax.train.validate import Validation
from tests.train.conftest import MODEL, changed, events, one_device, scheduled
from tests.train.test_step import batch

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


@pytest.mark.slow
def test_the_step_keeps_the_average_of_its_parameters_and_small_rates_move_them():
    """At a rate of 1e-6: after 12 steps the parameters have moved by as much as Adam's directions
    say, the average is the formula's, and a step that is skipped moves neither, as not finite or
    as a spike."""
    devices, tx = meshes.make(MeshConfig()), optimizer(AdamW(weight_decay=0.0, spikes=4.0))
    state = initial_state(MODEL, CausalLM(), tx, seed=0, mesh=devices)
    assert state.evaluated is state.params and not state.average
    state = averaging(state)
    start = wanted = jax.device_get(state.params)
    compute = Compute(precision='bfloat16')  # the parameters are float32 all the same
    step = train_step(
        *(MODEL, CausalLM(), tx),
        learning_rate=lambda step: jnp.float32(1e-6),
        accumulate=1,
        compute=compute,
        average=0.3,
    )
    with jax.set_mesh(devices):
        for taken in range(12):
            state, _ = step(state, place(batch(), devices))
            decay = min(0.3, (1 + taken) / (10 + taken))
            params = jax.device_get(state.params)
            wanted = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, wanted, params)
        before = jax.device_get((state.params, state.average))
        bad = batch()
        bad['weights'][0, 0] = np.nan
        state, metrics = step(state, place(bad, devices))
        assert (int(metrics['skipped']), int(metrics['spikes'])) == (1, 0)
        far_below = state.optimizer._replace(seen=jnp.int32(FIRST), mean=jnp.float32(-1e9))
        state, metrics = step(replace(state, optimizer=far_below), place(batch(), devices))
    assert (int(metrics['skipped']), int(metrics['spikes'])) == (1, 1)
    assert state.evaluated is state.average
    after = jax.device_get((state.params, state.average))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    for got, average, begun in zip(
        *(jax.tree.leaves(tree) for tree in (state.average, wanted, start)), strict=True
    ):
        moved = np.abs(average - begun).max()
        assert moved > 0
        np.testing.assert_allclose(got - begun, average - begun, atol=0.01 * moved + 1e-7)
    # One batch again and again: Adam's directions are near 1, and the sum of 12 rates is moved.
    moved = np.abs(before[0]['blocks']['mlp']['down_FD'] - start['blocks']['mlp']['down_FD'])
    assert np.median(moved) == pytest.approx(12e-6, rel=0.05)


@pytest.fixture(scope='module')
def restless(short):
    """Too high a rate: validations become worse after the first."""
    restless = changed(short, 'evaluation', every=2, batches=1, patience=2)
    restless = changed(restless, 'train', steps=20)
    restless = changed(restless, 'checkpoint', every=0, keep=1)
    restless = scheduled(restless, peak=0.5, kind='constant', warmup_steps=0)
    return changed(restless, 'optimizer', average=0.2, layer_decay=0.9)


@pytest.mark.slow
def test_a_run_ends_early_keeps_its_best_and_goes_on_alike(restless, tmp_path):
    workdir = tmp_path / 'run'
    loop.train(restless, workdir)
    scores = {
        line['step']: line['bits_per_byte']
        for line in read_metrics(workdir)
        if line['kind'] == 'validation'
    }
    best = min(scores, key=scores.get)
    last = max(scores)
    assert last == best + 4 < 20 and list(scores) == list(range(2, last + 1, 2))
    (said,) = events(workdir)
    assert said.startswith(f'ended after step {last} of 20: 2 validations in a row')
    assert f'step {best}, which is {workdir}@best' in said
    saved = sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())
    assert saved == [best, last]

    # What loads the run gets the average, which is what was validated.
    devices = meshes.make(MeshConfig())
    found = load(f'{workdir}@best', devices)
    validation = Validation(restless, found.tokenizer, devices)
    with jax.set_mesh(devices):
        assert validation(found.params)['bits_per_byte'] == scores[best]

    # The same command takes no step; from its middle it comes to the same end, bit for bit.
    loop.train(restless, workdir)
    assert events(workdir)[-1] == said
    lines = [line for line in read_metrics(workdir) if line['kind'] == 'train']
    assert lines[-1]['step'] == last
    sums = checksums(workdir, last)
    assert sums.keys() == {'params', 'average', 'rest'}
    shutil.rmtree(workdir / 'checkpoints' / str(last))
    loop.train(restless, workdir)
    assert checksums(workdir, last) == sums
    again = [line for line in read_metrics(workdir) if line['kind'] == 'train']
    assert [line['loss'] for line in again] == [line['loss'] for line in lines]

    # With more patience it goes on; another decay of the average has another past.
    longer = changed(changed(restless, 'evaluation', patience=9), 'train', steps=last + 1)
    loop.train(longer, workdir)
    assert max(line['step'] for line in read_metrics(workdir)) == last + 1
    with pytest.raises(UserError, match=r'optimizer\.average: 0\.2 -> 0\.0: .*--start'):
        loop.train(changed(longer, 'optimizer', average=0.0), workdir)


def checksums(workdir, step):
    checkpoints = Checkpoints(workdir / 'checkpoints', keep=9, read_only=True)
    try:
        return checkpoints.metadata(step)['checksums']
    finally:
        checkpoints.close()


def test_patience_without_validations_is_refused(restless):
    with pytest.raises(UserError, match='--evaluation.patience 2 has no effect without'):
        check(changed(restless, 'evaluation', every=0), run.meshes.make(MeshConfig()))

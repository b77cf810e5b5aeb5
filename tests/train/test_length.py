"""The length of a run in steps, tokens or epochs."""

import dataclasses
import math

import pytest

from llama_jax import mesh as meshes
from llama_jax.compare import budget, fair
from llama_jax.compare.grid import Arm, Grid
from llama_jax.errors import UserError
from llama_jax.evaluate.suite import Suite
from llama_jax.mesh import MeshConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.switch import Switch
from llama_jax.train import loop
from llama_jax.train.experiment import check
from llama_jax.train.records import read_metrics, read_run
from tests.train.conftest import changed, events, one_device, scheduled

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


@pytest.fixture
def plain(short):
    """Without validations, so that its length is all that matters."""
    return changed(short, 'evaluation', every=0)


def of(experiment, **length):
    return changed(experiment, 'train', **{'steps': 0, 'tokens': 0, 'epochs': 0.0} | length)


@pytest.mark.parametrize(
    'length, message',
    [
        ({}, 'a run without an end: set --train.steps, --train.tokens or --train.epochs'),
        ({'steps': 8, 'epochs': 2.0}, '--train.steps 8 and --train.epochs 2.0 are both set'),
        ({'tokens': 800, 'epochs': 2.0}, '--train.tokens 800 and --train.epochs 2.0 are both set'),
        ({'steps': -1}, '--train.steps is -1'),
        ({'epochs': -0.5}, '--train.epochs is -0.5'),
        ({'epochs': math.inf}, '--train.epochs is inf'),
        ({'epochs': math.nan}, '--train.epochs is nan'),
        ({'tokens': 2 * 8 * 32}, 'a warm-up of 2 steps leaves nothing of a run of 2'),
    ],
)
def test_one_length_is_given(plain, length, message):
    with pytest.raises(UserError) as raised:
        check(of(plain, **length), meshes.make(MeshConfig()))
    assert str(raised.value).startswith(message) and '\n' not in str(raised.value)


def test_tokens_are_rounded_up_to_steps(plain, tmp_path):
    loop.train(of(plain, tokens=3 * 8 * 32 + 1), tmp_path)
    train = read_run(tmp_path)['experiment']['train']
    assert (train['steps'], train['tokens']) == (4, 0)
    assert read_metrics(tmp_path)[-1]['tokens'] == 4 * 8 * 32
    assert events(tmp_path) == ['--train.tokens 769: 4 steps']


@pytest.mark.slow
def test_epochs_are_read_and_may_change_when_a_run_goes_on(plain, tmp_path):
    """The record holds the steps; the same command finds nothing changed."""

    def read():
        lines = [line for line in read_metrics(tmp_path) if line['kind'] == 'train']
        assert lines[-1]['step'] == read_run(tmp_path)['experiment']['train']['steps']
        return lines[-1]['step'], lines[-1]['epochs'], lines[0]['epochs']

    loop.train(of(plain, epochs=0.05), tmp_path)
    steps, epochs, batch = read()
    assert steps > 4 and epochs == pytest.approx(0.05, abs=0.6 * batch)
    loop.train(of(plain, epochs=0.05), tmp_path)
    assert not any('setting changed' in text for text in events(tmp_path))
    with pytest.raises(UserError, match=f'has taken {steps} steps: set --train.steps {steps} or'):
        loop.train(of(plain, epochs=0.03), tmp_path)
    loop.train(of(plain, epochs=0.06), tmp_path)
    more, epochs, _ = read()
    assert more > steps and epochs == pytest.approx(0.06, abs=0.6 * batch)
    assert any(f'train.steps: {steps} -> {more}' in text for text in events(tmp_path))


def test_a_warm_up_longer_than_the_epochs_is_refused(plain, tmp_path):
    with pytest.raises(UserError, match='a warm-up of 500 steps leaves nothing of a run of'):
        loop.train(scheduled(of(plain, epochs=0.05), warmup_steps=500), tmp_path)


def test_epochs_too_short_for_every_part_of_an_objective_are_refused(plain, tmp_path):
    parts = Switch((CausalLM(), MaskedLM()), (0, 10_000))
    with pytest.raises(UserError, match='MaskedLM begins at step 10000, and the run has'):
        loop.train(dataclasses.replace(of(plain, epochs=0.05), objective=parts), tmp_path)


@pytest.mark.parametrize('length', [{'tokens': 8000}, {'epochs': 1.0}, {'steps': 8, 'tokens': 80}])
def test_a_grid_takes_steps_only(plain, length):
    arms = tuple(Arm(name, of(plain, **length)) for name in ('a', 'b'))
    grid = Grid('tiny', 'Two arms', arms, 1, Suite(span=16, window=32))
    for refuses in (fair.check, budget.match_flops):
        with pytest.raises(UserError, match='arm a: --train.(tokens|epochs) .* in a grid'):
            refuses(grid)
    steps = dataclasses.replace(grid, arms=(Arm('a', of(plain)),))
    with pytest.raises(UserError, match='arm a: --train.steps is 0'):
        fair.check(steps)

"""The training step around objectives of one line: its keys, and what it takes for finite."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import mesh
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.base import Base, Loss
from llama_jax.train.place import place
from llama_jax.train.step import initial_state, train_step

B = 4
MODEL = ModelConfig(
    vocab=16, dim=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn=8, context=8, tied=True
)
MANY = 1 << 12


@dataclass(frozen=True)
class Draws(Base):
    """Counts, for each number below MANY, how often it was drawn."""

    times: int = 1

    @property
    def updates(self):
        return self.times

    def loss(self, model, batch, *, extra, compute, key, context):
        weight = batch['weights'].sum()
        drawn = weight * jax.nn.one_hot(jax.random.randint(key, (), 0, MANY), MANY)
        return Loss(jnp.zeros(()), weight, {'drawn': drawn})


@dataclass(frozen=True)
class Sums(Base):
    """Gradients of the batch's `slope`, beside its `constant` of which there are none."""

    def loss(self, model, batch, *, extra, compute, key, context):
        # At 0 the root has no finite slope, and a finite value.
        root = jnp.sqrt(batch['slope'].sum() * jnp.sum(model.embed_VD**2))
        return Loss(root + batch['constant'].sum(), jnp.float32(1), {})


@functools.cache
def on_one():
    return mesh.make(MeshConfig(), jax.devices()[:1])


def start(objective, accumulate=1):
    step = train_step(
        *(MODEL, objective, optax.identity()),
        learning_rate=lambda step: 0.1,
        accumulate=accumulate,
        compute=Compute(),
    )
    return step, initial_state(MODEL, objective, optax.identity(), seed=0, mesh=on_one())


@pytest.mark.parametrize(('accumulate', 'updates'), [(4, 1), (2, 3)])
def test_every_step_update_and_microbatch_draws_by_a_key_of_its_own(accumulate, updates):
    step, state = start(Draws(updates), accumulate)
    drawn = []
    with jax.set_mesh(on_one()):
        for _ in range(3):
            batch = place({'weights': np.ones((B, 1), np.float32)}, on_one())
            state, metrics = step(state, batch)
            drawn.append(np.flatnonzero(metrics['drawn']).tolist())
    assert [len(numbers) for numbers in drawn] == [accumulate * updates] * 3
    assert len({number for numbers in drawn for number in numbers}) == 3 * accumulate * updates


def test_neither_a_loss_nor_a_gradient_that_is_not_finite_moves_anything():
    step, state = start(Sums())

    def take(state, **values):
        batch = {name: np.full((B, 1), value, np.float32) for name, value in values.items()}
        return step(state, place(batch, on_one()))

    with jax.set_mesh(on_one()):
        before = np.asarray(state.params['embed_VD'])
        state, metrics = take(state, slope=0, constant=1)
        assert metrics['loss'] == B and not np.isfinite(metrics['grad_norm'])
        assert metrics['skipped'] == 1
        state, metrics = take(state, slope=1, constant=np.inf)
        assert np.isinf(metrics['loss']) and np.isfinite(metrics['grad_norm'])
        assert metrics['skipped'] == metrics['skipped_in_a_row'] == 2
        np.testing.assert_array_equal(state.params['embed_VD'], before)
        state, metrics = take(state, slope=1, constant=1)
        assert metrics['skipped'] == 2 and metrics['skipped_in_a_row'] == 0
        assert np.abs(state.params['embed_VD'] - before).max() > 1e-3

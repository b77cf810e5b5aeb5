"""What an objective carries from step to step: here an average of the model, and a queue."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import layout, mesh
from llama_jax.data.config import DataConfig
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.tune import LoRA
from llama_jax.objectives.base import EXTRA, Base, Loss
from llama_jax.objectives.weighted import Weighted
from llama_jax.optim.spikes import FIRST, without_spikes
from llama_jax.train import run
from llama_jax.train.experiment import Experiment, TrainConfig, check
from llama_jax.train.place import place
from llama_jax.train.step import abstract_state, carrying, initial_state, train_step
from llama_jax.train.validate import loss_step

MODEL = ModelConfig(vocab=16, dim=8, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=8, context=8)
ROWS = 8
DECAY = 0.75


@dataclass(frozen=True)
class Ema(Base):
    """Pulls the embedding to where its average was, and keeps the last batch."""

    def extra(self, model, key):
        return {'shift_D': jnp.ones(model.dim)}

    def carried(self, model, params, key):
        teacher = {'embed_VD': params['embed_VD'], 'shift_D': params[EXTRA]['shift_D']}
        return {'teacher': teacher, 'queue_C': jax.random.normal(key, (ROWS,))}

    def carry(self, carried, params, kept, step):
        now = {'embed_VD': params['embed_VD'], 'shift_D': params[EXTRA]['shift_D']}
        teacher = jax.tree.map(
            lambda old, new: DECAY * old + (1 - DECAY) * new, carried['teacher'], now
        )
        return {'teacher': teacher, 'queue_C': layout.gather(kept['x'], 'CJ')[:, 0] + step}

    def loss(self, model, batch, *, extra, compute, key, context):
        apart = model.embed_VD[...] - 2 * context.carried['teacher']['embed_VD']
        total = jnp.sum(batch['x']) * jnp.sum(jnp.square(apart))
        figures = {'queue': context.carried['queue_C'].sum(), 'shift': extra['shift_D'].sum()}
        return Loss(total, jnp.float32(1), figures, kept={'x': batch['x']})


def on(n):
    return mesh.make(MeshConfig(), jax.devices()[:n])


IDENTITY = optax.identity()


def steps(objective, devices, accumulate=1, tx=IDENTITY):
    step = train_step(
        *(MODEL, objective, tx),
        learning_rate=lambda step: 0.01,
        accumulate=accumulate,
        compute=Compute(),
    )
    return step, initial_state(MODEL, objective, tx, seed=0, mesh=devices)


def batch(x, devices, name='x'):
    rows = np.full((ROWS, 1), x, np.float32) + np.arange(ROWS, dtype=np.float32)[:, None]
    return place({name: rows, f'1/{name}': rows}, devices)


@pytest.mark.parametrize(('n_devices', 'accumulate'), [(1, 1), (4, 2)])
def test_what_is_carried_follows_the_parameters_and_is_of_the_step_before(n_devices, accumulate):
    devices = on(n_devices)
    step, state = steps(Ema(), devices, accumulate)
    teacher = np.asarray(state.carried['teacher']['embed_VD'])
    np.testing.assert_array_equal(teacher, state.params['embed_VD'])
    queue = np.asarray(state.carried['queue_C'])
    assert np.ptp(queue) > 0
    with jax.set_mesh(devices):
        for i in range(3):
            state, metrics = step(state, batch(i, devices))
            np.testing.assert_allclose(metrics['queue'], queue.sum(), rtol=1e-5)
            teacher = DECAY * teacher + (1 - DECAY) * np.asarray(state.params['embed_VD'])
            np.testing.assert_allclose(state.carried['teacher']['embed_VD'], teacher, rtol=1e-5)
            queue = np.asarray(state.carried['queue_C'])
            np.testing.assert_array_equal(queue, 2 * i + np.arange(ROWS))
        before = jax.tree.map(np.asarray, state.carried)
        state, metrics = step(state, batch(np.nan, devices))
    assert int(metrics['skipped']) == 1
    jax.tree.map(np.testing.assert_array_equal, before, state.carried)


def test_what_is_carried_stays_where_an_update_is_skipped_as_a_spike():
    devices = on(1)
    step, state = steps(Ema(), devices, tx=without_spikes(optax.identity(), 4.0))
    with jax.set_mesh(devices):
        state, _ = step(state, batch(0, devices))
        before = jax.tree.map(np.asarray, state.carried)
        far_below = state.optimizer._replace(seen=jnp.int32(FIRST), mean=jnp.float32(-1e9))
        state, metrics = step(replace(state, optimizer=far_below), batch(1, devices))
    assert (int(metrics['spikes']), int(metrics['skipped'])) == (1, 0)
    jax.tree.map(np.testing.assert_array_equal, before, state.carried)


def test_it_is_placed_as_parameters_are_and_begins_with_those_of_the_run():
    devices = on(4)
    abstract = abstract_state(MODEL, Ema(), optax.identity())
    placed = layout.shardings(abstract, devices)
    assert placed.carried['teacher']['embed_VD'] == placed.params['embed_VD']
    state = initial_state(MODEL, Ema(), optax.identity(), seed=0, mesh=devices)
    moved = replace(state, params=jax.tree.map(lambda x: x + 1, state.params))
    again = carrying(MODEL, Ema(), moved)
    np.testing.assert_array_equal(again.carried['teacher']['embed_VD'], moved.params['embed_VD'])
    np.testing.assert_array_equal(again.carried['queue_C'], state.carried['queue_C'])
    assert {'params', 'carried', 'rest'} == set(run._items(state))


def test_parts_of_a_sum_carry_their_own():
    devices = on(1)
    both = Weighted(parts=(Ema(), Ema()), weights=(1.0, 1.0), shares=(0.5, 0.5))
    step, state = steps(both, devices)
    assert set(state.carried) == {'0', '1'}
    assert np.any(state.carried['0']['queue_C'] != state.carried['1']['queue_C'])
    with jax.set_mesh(devices):
        sums = loss_step(MODEL, both, Compute())(
            state.params, batch(1, devices), carried=state.carried
        )
        state, metrics = step(state, batch(1, devices))
    np.testing.assert_allclose(metrics['loss'], sums.total, rtol=1e-5)
    for k in '01':
        np.testing.assert_array_equal(state.carried[k]['queue_C'], 1 + np.arange(ROWS))
        assert np.any(state.carried[k]['teacher']['embed_VD'] != state.params['embed_VD'])


def test_a_run_of_adapters_is_refused():
    experiment = Experiment(
        name='ema',
        model=MODEL,
        data=DataConfig(),
        train=TrainConfig(steps=4000, batch=8, seq_len=8),
        objective=Ema(),
    )
    check(experiment, on(1))
    with pytest.raises(UserError, match='Ema carries a copy.*--tune Full') as error:
        check(replace(experiment, tune=LoRA(), start='x'), on(1))
    assert '\n' not in str(error.value)

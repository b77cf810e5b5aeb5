"""The training step: the same on every mesh and in any number of microbatches."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from llama_jax import layout, mesh, optim, trees
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.optim import AdamW, Muon
from llama_jax.optim.base import optimizer
from llama_jax.train.run import place
from llama_jax.train.step import abstract_state, initial_state, train_step
from llama_jax.trees import named
from tests.train.conftest import MODEL
from tests.train.every import EVERY

B, T = 8, 16
MESHES = {
    'one device': (1, MeshConfig()),
    'fsdp 8': (8, MeshConfig()),
    'tensor 2 fsdp 4': (8, MeshConfig(tensor=2)),
    'slice 2 fsdp 2 tensor 2': (8, MeshConfig(slice=2, fsdp=2, tensor=2)),
}


# The tests of this file hold sums to the rounding of the program that users run, which adds in
# vectors; tests/conftest.py has less effort made elsewhere.
AS_USERS_DO = {'xla_backend_optimization_level': 3}
PROGRAMS = {}


def make_mesh(name):
    n_devices, config = MESHES[name]
    # The devices of a CPU are of one slice: two of them are replicas within it, by another name.
    within = replace(config, slice=1, data=config.data * config.slice)
    made = mesh.make(within, jax.devices()[:n_devices])
    sizes = (config.slice, config.data, *made.devices.shape[2:])
    return Mesh(made.devices.reshape(sizes), mesh.AXES, axis_types=made.axis_types)


def recorder():
    """Keeps the last gradient (or update) it is given in its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params: (updates, updates),
    )


# Adam divides a gradient by its own size; only its epsilon keeps the rounding of small gradients
# from becoming large updates.
ADAMW = optimizer(AdamW(eps=1e-2))

TX = optax.chain(recorder(), ADAMW, recorder())


@functools.cache
def compiled(name='one device', *, accumulate=1, dropout=0.0, precision='float32'):
    """(devices, fresh state, step). The state's optimizer is (gradient, AdamW, update)."""
    devices = make_mesh(name)
    config = ModelConfig(**{**vars(MODEL), 'dropout': dropout})
    step = train_step(
        config,
        CausalLM(),
        TX,
        learning_rate=lambda step: 3e-4,
        accumulate=accumulate,
        compute=Compute(precision=precision),
    )

    # Made once on one device: test_initial_values_do_not_depend_on_the_mesh.
    host, placed = _initial(), layout.shardings(abstract_state(config, CausalLM(), TX), devices)

    def fresh():
        return jax.tree.map(lambda x, to: jax.device_put(x.copy(), to), host, placed)

    return devices, fresh, step


@functools.cache
def _initial():
    return initial_state(MODEL, CausalLM(), TX, seed=0, mesh=make_mesh('one device'))


def batch(seed=0):
    """Random tokens; rows weigh unevenly, so that microbatches do; two documents in some rows."""
    rng = np.random.default_rng(seed)
    token_BT = rng.integers(0, MODEL.vocab, (B, T + 1)).astype(np.int32)
    weight_BT = (rng.random((B, T)) < np.linspace(0.1, 1, B)[:, None]).astype(np.float32)
    segment_BT = 1 + (np.arange(T) > rng.integers(4, 2 * T, (B, 1))).astype(np.int32)
    return {
        'inputs': token_BT[:, :-1],
        'targets': token_BT[:, 1:],
        'weights': weight_BT,
        'segments': segment_BT,
        'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    }


def take(name='one device', batches=None, state=None, **settings):
    """The state after these batches, and the metrics of each step."""
    batches = [batch()] if batches is None else batches
    devices, fresh, step = compiled(name, **settings)
    state = fresh() if state is None else state
    found = []
    with jax.set_mesh(devices):
        for one in batches:
            placed = place(one, devices)
            if step not in PROGRAMS:
                PROGRAMS[step] = step.lower(state, placed).compile(compiler_options=AS_USERS_DO)
            state, metrics = PROGRAMS[step](state, placed)
            found.append(jax.device_get(metrics))
    return state, found


def error(got, wanted):
    """Distance of two trees relative to the second, float64."""
    got, wanted = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
        for tree in (got, wanted)
    )
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def assert_same_step(got, wanted):
    (state, (metrics,)), (wanted_state, (wanted_metrics,)) = got, wanted
    assert metrics['weight'] == wanted_metrics['weight']
    for name in ('loss', 'nll', 'grad_norm'):
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-6, err_msg=name)
    gradient, _, update = state.optimizer
    wanted_gradient, _, wanted_update = wanted_state.optimizer
    assert error(update, wanted_update) < 1e-6
    for (name, array), (_, wanted_array) in zip(
        trees.named(gradient), trees.named(wanted_gradient), strict=True
    ):
        assert error(array, wanted_array) < 1e-6, name


@pytest.mark.slow
def test_accumulation_equals_the_large_batch():
    weights = batch()['weights'].sum(1)
    assert len(set(weights)) > 4  # the mean of the microbatches' means would be another loss
    assert_same_step(take(accumulate=B), take())


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in MESHES if name != 'one device'])
def test_sharded_step_equals_the_step_of_one_device(name):
    assert_same_step(take(name), take())


@pytest.mark.slow
def test_sharded_accumulation_equals_the_step_of_one_device():
    assert_same_step(take('tensor 2 fsdp 4', accumulate=2), take())


def test_loss_is_the_mean_over_the_tokens_that_weigh():
    _, (metrics,) = take()
    half = batch()
    half['weights'] = half['weights'] / 2
    _, (halved,) = take(batches=(half,))
    assert metrics['weight'] == batch()['weights'].sum() == 2 * halved['weight']
    np.testing.assert_allclose(halved['loss'], metrics['loss'], rtol=1e-6)
    np.testing.assert_allclose(halved['grad_norm'], metrics['grad_norm'], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['one device', 'tensor 2 fsdp 4'])
def test_state_is_donated_and_nothing_compiles_twice(name, caplog):
    devices, fresh, step = compiled(name)
    state = fresh()
    shards = [x.addressable_data(0) for x in jax.tree.leaves(state)]
    n_bytes = sum(x.nbytes for x in shards if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))
    with jax.log_compiles(), jax.set_mesh(devices):
        program = step.lower(state, place(batch(), devices)).compile()
    assert 'jit(step)' in caplog.text
    assert program.memory_analysis().alias_size_in_bytes >= n_bytes
    with jax.log_compiles(), jax.set_mesh(devices):
        later, _ = step(state, place(batch(0), devices))
        assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
        caplog.clear()  # that call may compile
        for seed in (1, 2):
            later, _ = step(later, place(batch(seed), devices))
    assert 'jit(step)' not in caplog.text


@pytest.mark.parametrize('name', optim.REGISTRY)
def test_no_first_value_has_a_weak_type(name):
    """The second step would be compiled anew, for what a step makes has none."""
    settings = {} if name == 'adafactor' else {'spikes': 4.0}
    state = abstract_state(MODEL, CausalLM(), optimizer(optim.REGISTRY[name](**settings)))
    assert not [path for path, leaf in named(state) if leaf.weak_type]


def test_nor_has_one_of_an_objective():
    for objective, model in EVERY.values():
        state = abstract_state(model, objective, optax.identity())
        assert not [path for path, leaf in named(state) if leaf.weak_type], objective


@pytest.mark.parametrize('bad', [np.inf, np.nan])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_count(bad):
    state, _ = take(batches=[batch(0)])
    before = jax.tree.map(np.asarray, (state.params, state.optimizer))
    poisoned = batch(1)
    poisoned['weights'][3, 5] = bad
    state, metrics = take(batches=[poisoned, poisoned], state=state)
    after = jax.tree.map(np.asarray, (state.params, state.optimizer))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert [int(m['skipped']) for m in metrics] == [1, 2]
    assert [int(m['skipped_in_a_row']) for m in metrics] == [1, 2]
    assert int(state.step) == 3
    state, (metrics,) = take(batches=[batch(2)], state=state)
    assert int(metrics['skipped']) == 2 and int(metrics['skipped_in_a_row']) == 0
    assert not np.array_equal(state.params['embed_VD'], before[0]['embed_VD'])


@pytest.mark.slow
def test_the_rate_logged_is_the_rate_applied_also_after_a_skipped_step():
    """A skipped step does not hold the schedule up: what is subtracted is that rate times what the
    optimizer makes of the gradient."""
    devices = make_mesh('one device')
    tx = optax.chain(ADAMW, recorder())  # its state keeps the direction
    step = train_step(
        MODEL,
        CausalLM(),
        tx,
        learning_rate=lambda step: 1e-3 * (1.0 + step),
        accumulate=1,
        compute=Compute(),
    )
    state = initial_state(MODEL, CausalLM(), tx, seed=0, mesh=devices)
    poisoned = batch(1)
    poisoned['weights'][0, 0] = np.nan
    for number, one in enumerate((poisoned, batch(0), batch(2)), start=1):
        before = np.asarray(state.params['embed_VD'], np.float64)
        with jax.set_mesh(devices):
            state, metrics = step(state, place(one, devices))
        assert float(metrics['learning_rate']) == pytest.approx(1e-3 * number)
        if number > 1:
            direction = np.asarray(state.optimizer[1]['embed_VD'], np.float64)
            moved = before - np.asarray(state.params['embed_VD'], np.float64)
            np.testing.assert_allclose(moved, 1e-3 * number * direction, atol=2e-7)
            assert np.abs(moved).max() > 1e-5


def test_a_batch_without_weight_has_no_loss():
    empty = batch()
    empty['weights'][:] = 0
    state, (metrics,) = take(batches=[empty])
    assert metrics['loss'] == metrics['grad_norm'] == metrics['skipped'] == 0


@pytest.mark.slow
def test_dropout_differs_from_step_to_step_and_from_row_to_row():
    same_rows = {name: np.tile(x[:1], (B, 1)) for name, x in batch().items()}
    same_rows['weights'][:] = 1
    _, first = take(batches=[same_rows], dropout=0.5)
    _, again = take(batches=[same_rows], dropout=0.5)
    assert first[0]['loss'] == again[0]['loss']
    # Another step with the first parameters: only the mask is another.
    devices, fresh, step = compiled(dropout=0.5)
    later = jax.tree_util.tree_map(lambda x: x, fresh())
    object.__setattr__(later, 'step', later.step + 1)
    _, other = take(batches=[same_rows], state=later, dropout=0.5)
    assert abs(other[0]['loss'] - first[0]['loss']) > 1e-4


@pytest.mark.slow
def test_bfloat16_compute_trains_float32_parameters():
    start, _ = take(precision='bfloat16')
    assert {x.dtype for x in jax.tree.leaves(start.params)} == {jnp.dtype('float32')}
    _, metrics = take(batches=[batch()] * 30, precision='bfloat16', state=start)
    _, exact = take()
    losses = [float(m['loss']) for m in metrics]
    assert losses[-1] < losses[0] - 0.3
    assert metrics[0]['loss'] == pytest.approx(float(exact[0]['loss']), rel=0.02)
    assert losses[0] != float(exact[0]['loss'])


@pytest.mark.parametrize('make', ['parameters', 'state'])
def test_nothing_is_made_whole_on_one_device(make, monkeypatch):
    """Its program needs temporary memory for some shards, not for whole arrays."""
    measured = []
    jit = jax.jit

    def spy(function, **settings):
        program = jit(function, **settings)

        def call(*arguments):
            measured.append(program.lower(*arguments).compile().memory_analysis())
            return program(*arguments)

        return call

    devices = make_mesh('tensor 2 fsdp 4')
    large = ModelConfig(**{**vars(MODEL), 'dim': 512, 'ffn': 2048, 'layers': 4, 'vocab': 4096})
    monkeypatch.setattr(jax, 'jit', spy)
    if make == 'parameters':
        layers.create(large, jax.random.key(0), devices)
    else:
        initial_state(large, CausalLM(), optax.identity(), seed=0, mesh=devices)
    monkeypatch.undo()
    (used,) = measured
    assert used.output_size_in_bytes < trees.n_bytes(layers.abstract(large)) / 7
    assert used.temp_size_in_bytes < 3 * used.output_size_in_bytes


@pytest.mark.slow
def test_initial_values_do_not_depend_on_the_mesh():
    names = ('one device', 'slice 2 fsdp 2 tensor 2')
    states = [initial_state(MODEL, CausalLM(), TX, seed=0, mesh=make_mesh(name)) for name in names]
    params = [jax.device_get(state.params) for state in states]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_step_that_skips_spikes_counts_them_and_keeps_its_places():
    """Traced alone: types carry the placement."""
    devices, tx = make_mesh('tensor 2 fsdp 4'), optimizer(Muon(spikes=4.0))
    step = train_step(
        *(MODEL, CausalLM(), tx),
        learning_rate=lambda step: 3e-4,
        accumulate=1,
        compute=Compute(),
    )
    state = abstract_state(MODEL, CausalLM(), tx)
    state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        *(state, layout.shardings(state, devices)),
    )
    with jax.set_mesh(devices):
        after, metrics = step.trace(state, place(batch(), devices)).out_info
    assert 'spikes' in metrics
    for (path, got), (_, given) in zip(named(after), named(state), strict=True):
        assert got.sharding.spec == given.sharding.spec, path

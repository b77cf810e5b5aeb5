"""DPO against loops over pairs in float64, its invariants, and what it refuses."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.tune import LoRA, combined, trained
from llama_jax.objectives.preference import DPO, answer_log_probs
from llama_jax.train.step import initial_state, train_step
from tests.objectives import preferred
from tests.objectives.pairs import make_mesh, place
from tests.objectives.preferred import SEQ_LEN, VOCAB, log_sigmoid

CONFIG = ModelConfig(
    vocab=VOCAB, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64
)
CONFIG = replace(CONFIG, positions='learned')  # not by differences alone
COMPUTE = Compute(attention='reference', unroll=1)
N = 11
RECORDS = preferred.records(N)
GIVEN = preferred.references(N)


class Lookup:
    """The smallest model: the features of a token are a row of a table, and the head is another."""

    config = SimpleNamespace(vocab_padding=0)

    def __init__(self, table_VD, head_VD):
        self.table_VD, self.head_VD = table_VD, head_VD

    def features(self, token_BT, **_):
        return self.table_VD.at[token_BT].get(out_sharding=layout.act('BTD')), None

    def head(self):
        return self.head_VD


def table(seed):
    return np.random.default_rng(seed).normal(size=(VOCAB, 8)).astype(np.float32)


def lookup(table_VD):
    """With the head as it lies at rest on the mesh in use."""
    return Lookup(table_VD, jax.reshard(jnp.asarray(table(1)), layout.param('VD')))


@functools.cache
def lookup_loss(objective, name='one device'):
    devices = make_mesh(name)
    batch = preferred.batch(objective, RECORDS, GIVEN, rows=8)

    def run(batch):
        model = lookup(jnp.asarray(table(0)))
        return objective.loss(model, batch, extra={}, compute=COMPUTE, key=None)

    with jax.set_mesh(devices):
        return jax.device_get(jax.jit(run)(place(batch, devices))), batch


@functools.cache
def oracle():
    return preferred.log_probs(lambda ids: table(0)[ids] @ table(1).T, RECORDS)


@pytest.mark.parametrize('name', ['one device', 'data 2 fsdp 2 tensor 2'])
@pytest.mark.parametrize(
    'objective',
    [DPO(), DPO(beta=0.3, smoothing=0.2, nll=0.5), DPO(loss_type='ipo', nll=0.5)],
    ids=['sigmoid', 'smoothing and nll', 'ipo'],
)
def test_loss_of_a_packed_batch_equals_loops_over_its_pairs(objective, name):
    loss, batch = lookup_loss(objective, name)
    log_p_P2, n_P2 = oracle()
    gain_P2 = log_p_P2 - GIVEN
    margin_P = objective.beta * (gain_P2[:, 0] - gain_P2[:, 1])
    e = objective.smoothing
    each_P = -(1 - e) * log_sigmoid(margin_P) - e * log_sigmoid(-margin_P)
    if objective.loss_type == 'ipo':
        mean_P2 = gain_P2 / n_P2
        each_P = (mean_P2[:, 0] - mean_P2[:, 1] - 1 / (2 * objective.beta)) ** 2
    nll_P = -log_p_P2[:, 0] / n_P2[:, 0]
    assert batch['chosen/segments'].max() > 1 and batch['chosen/segments'].min() == 0
    assert loss.weight == N
    assert objective.loss_tokens(batch) == n_P2.sum()
    np.testing.assert_allclose(loss.total, (each_P + objective.nll * nll_P).sum(), rtol=1e-5)
    means = {name: value / N for name, value in loss.metrics.items()}
    wanted = {
        'accuracy': (margin_P > 0).mean(),
        'margin': margin_P.mean(),
        'reward_chosen': objective.beta * gain_P2[:, 0].mean(),
        'reward_rejected': objective.beta * gain_P2[:, 1].mean(),
        'log_prob_chosen': log_p_P2[:, 0].mean(),
        'log_prob_rejected': log_p_P2[:, 1].mean(),
        'nll_chosen': nll_P.mean(),
    }
    assert means.keys() == wanted.keys()
    for metric, value in wanted.items():
        np.testing.assert_allclose(means[metric], value, rtol=1e-4, atol=1e-5, err_msg=metric)


def test_swapping_the_answers_negates_the_margin():
    objective = DPO()
    swapped = [
        record._replace(parts=record.parts[::-1], weights=record.weights[::-1])
        for record in RECORDS
    ]
    devices = make_mesh('one device')
    batch = preferred.batch(objective, swapped, GIVEN[:, ::-1], rows=8)
    with jax.set_mesh(devices):
        model = lookup(jnp.asarray(table(0)))
        run = jax.jit(lambda x: objective.loss(model, x, extra={}, compute=COMPUTE, key=None))
        loss = run(place(batch, devices))
    before, _ = lookup_loss(objective)
    for one, other in (
        ('margin', 'margin'),
        ('reward_chosen', 'reward_rejected'),
    ):
        sign = -1 if one == other else 1
        np.testing.assert_allclose(loss.metrics[one], sign * before.metrics[other], rtol=1e-5)


# The whole model.


def own_references(objective, records):
    """Log-probabilities [n, 2] under the model itself, of a packed batch."""
    devices = make_mesh('one device')
    state = initial_state(CONFIG, objective, NO_OPTIMIZER, seed=0, mesh=devices)
    batch = preferred.batch(objective, records, rows=8)
    with jax.set_mesh(devices):

        @jax.jit
        def log_probs(params, batch):
            model = layers.bind(CONFIG, params)
            return answer_log_probs(model, batch, compute=COMPUTE, key=None)

        pair_BM2 = np.stack(log_probs(state.params, place(batch, devices)), axis=-1)
    places = [(b, m) for b in range(8) for m in range(batch['chosen/segments'][b].max())]
    return np.array([pair_BM2[b, m] for b, m in places])


NO_OPTIMIZER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params: (updates, updates),
)
"""Its state is the gradient."""


@functools.cache
def step_of(objective, accumulate):
    return train_step(
        CONFIG,
        objective,
        NO_OPTIMIZER,
        learning_rate=lambda step: 0.0,
        accumulate=accumulate,
        compute=COMPUTE,
    )


def taken(objective, batch, *, accumulate=1):
    """Metrics and gradients of one step with that batch."""
    devices = make_mesh('one device')
    step = step_of(objective, accumulate)
    state = initial_state(CONFIG, objective, NO_OPTIMIZER, seed=0, mesh=devices)
    with jax.set_mesh(devices):
        state, metrics = step(state, place(batch, devices))
    return jax.device_get((metrics, state.optimizer))


def assert_equal_steps(one, other):
    (metrics, gradients), (other_metrics, other_gradients) = one, other
    for name in ('loss', 'margin', 'accuracy', 'nll_chosen', 'weight'):
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-5, atol=1e-6)
    size = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
    assert size > 0
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * size)


@pytest.mark.slow
def test_the_first_loss_is_ln_2_where_the_model_is_its_reference():
    objective = DPO()
    given = own_references(objective, RECORDS)
    metrics, gradients = taken(objective, preferred.batch(objective, RECORDS, given, rows=8))
    assert metrics['loss'] == np.float32(np.log(2)) and metrics['margin'] == 0
    assert metrics['weight'] == N and metrics['grad_norm'] > 0


@pytest.mark.slow
def test_packing_and_microbatches_change_neither_loss_nor_gradients():
    objective = DPO()
    packed = preferred.batch(objective, RECORDS[:8], GIVEN[:8], rows=8)
    assert packed['chosen/segments'].max() > 1
    rows = [
        preferred.batch(objective, RECORDS[i : i + 1], GIVEN[i : i + 1], rows=1) for i in range(8)
    ]
    alone = {name: np.concatenate([row[name] for row in rows]) for name in packed}
    whole = taken(objective, packed)
    assert_equal_steps(whole, taken(objective, packed, accumulate=8))
    assert_equal_steps(whole, taken(objective, alone))


def test_prompt_and_padding_bear_no_gradient():
    objective = DPO(nll=0.2)
    batch = preferred.batch(objective, RECORDS, GIVEN, rows=8)
    devices = make_mesh('one device')
    x_RTD = np.random.default_rng(0).normal(size=(16, SEQ_LEN // 2, 8)).astype(np.float32)

    class Given(Lookup):
        def features(self, token_BT, **_):
            return jax.reshard(self.table_VD, layout.act('BTD')), None

    with jax.set_mesh(devices):
        arrays = place(batch, devices)

        def total(x_RTD):
            model = Given(x_RTD, lookup(x_RTD).head_VD)
            return objective.loss(model, arrays, extra={}, compute=COMPUTE, key=None).total

        dx_RTD = np.asarray(jax.jit(jax.grad(total))(x_RTD))
    for i, stream in enumerate(('chosen', 'rejected')):
        bears_BT = np.abs(dx_RTD[i::2]).max(-1) > 0
        np.testing.assert_array_equal(bears_BT, batch[f'{stream}/weights'] > 0)


@pytest.mark.slow
def test_the_reference_with_adapters_off_is_the_base_that_they_are_upon():
    tune, devices = LoRA(rank=2), make_mesh('one device')
    base = initial_state(CONFIG, DPO(), NO_OPTIMIZER, seed=0, mesh=devices).params
    adapters = trained(tune, base, CONFIG, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)  # B is 0 at the beginning
    given = own_references(DPO(), RECORDS)
    batch = place(preferred.batch(DPO(), RECORDS, given, rows=8), devices)

    def run(objective):
        def total(adapters, batch):
            model = layers.bind(CONFIG, combined(tune, adapters, base))
            loss = objective.loss(model, batch, extra={}, compute=COMPUTE, key=None)
            return loss.total, loss

        return jax.jit(jax.grad(total, has_aux=True))(adapters, batch)

    with jax.set_mesh(devices):
        (one, loss), (other, wanted) = run(DPO(reference='adapters_off')), run(DPO())
    assert abs(loss.metrics['margin']) > 1e-3
    np.testing.assert_allclose(loss.total, wanted.total, rtol=1e-5)
    np.testing.assert_allclose(loss.metrics['margin'], wanted.metrics['margin'], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, other)


def test_settings_that_cannot_be_are_refused():
    for refused, match in (
        (lambda: DPO(beta=0.0), 'beta'),
        (lambda: DPO(beta=float('nan')), 'beta'),
        (lambda: DPO(smoothing=0.5), 'smoothing'),
        (lambda: DPO(smoothing=-0.1), 'smoothing'),
        (lambda: DPO(nll=-1.0), 'nll'),
        (lambda: DPO(loss_type='ipo', smoothing=0.1), 'no effect'),
        (lambda: DPO().lengths(33), 'even'),
        (lambda: DPO().check(SimpleNamespace(encoder_layers=2)), 'encoder'),
    ):
        with pytest.raises(UserError, match=match) as error:
            refused()
        assert '\n' not in str(error.value)

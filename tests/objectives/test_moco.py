"""MoCo over several steps against a queue that is a list, and the queue by itself."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.base import Context
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.moco import DOCUMENTS, NEXT, QUEUE, MomentumContrast, enqueued
from tests.objectives.pairs import make_mesh, place
from tests.objectives.test_contrastive import documents, pack

CONFIG = ModelConfig(
    vocab=64, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=24, context=32
)
COMPUTE = Compute(attention='reference', unroll=1)
OBJECTIVE = MomentumContrast(queue=40, momentum=0.7, temperature=0.2)
RATE = 0.3
ROWS = 8


def batches(n):
    return [
        pack(OBJECTIVE, documents(5, length=(10, 40), seed=seed), rows=ROWS, seed=seed)
        for seed in range(n)
    ]


@functools.cache
def program(objective, name):
    """A step of gradient descent: (params, carried, batch) -> (loss, params, carried)."""
    devices = make_mesh(name)

    @jax.jit
    def step(params, carried, batch):
        def total(params):
            loss = objective.loss(
                *(layers.bind(CONFIG, params), batch),
                extra={},
                compute=COMPUTE,
                key=None,
                context=Context(jnp.int32(0), carried),
            )
            return loss.total / loss.weight, loss

        grads, loss = jax.grad(total, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        return loss, params, objective.carry(carried, params, loss.kept, jnp.int32(0))

    return devices, step


@functools.cache
def begun(objective):
    devices = make_mesh('one device')
    params = layers.create(CONFIG, jax.random.key(0), devices)
    with jax.set_mesh(devices):
        carried = jax.jit(objective.carried, static_argnums=0)(CONFIG, params, jax.random.key(1))
    return jax.device_get((params, carried))


def run(objective, name, taken):
    """Losses of the batches, and what is there after them."""
    devices, step = program(objective, name)
    host = begun(objective)
    params, carried = jax.tree.map(jax.device_put, host, layout.shardings(host, devices))
    losses = []
    with jax.set_mesh(devices):
        for batch in taken:
            loss, params, carried = step(params, carried, place(batch, devices))
            losses.append(jax.device_get(loss))
    return losses, jax.device_get((params, carried))


def expected(taken):
    """The same by the definition: the queue is a list, and nothing is placed anywhere."""
    objective = OBJECTIVE
    devices = make_mesh('one device')
    params, carried = begun(objective)
    averaged, queue = carried['encoder'], [(k, -1) for k in carried[QUEUE]]
    oldest = list(range(len(queue)))

    @jax.jit
    def of(params, averaged, negative_QD, document_Q, batch):
        def total(params):
            vectors = [
                InfoNCE.encode(
                    *(objective, layers.bind(CONFIG, weights), batch, view),
                    compute=COMPUTE,
                    key=None,
                )
                for weights, view in ((params, 'a'), (averaged, 'b'))
            ]
            query_BMD, key_BMD = vectors[0], jax.lax.stop_gradient(vectors[1])

            def nll(query_D, key_D, segment, segment_T, document_T):
                here_T = segment_T == segment
                document = jnp.max(jnp.where(here_T, document_T, 0))
                other = jnp.where(document_Q == document, -jnp.inf, negative_QD @ query_D)
                logits = jnp.append(other, query_D @ key_D) / objective.temperature
                return jnp.where(here_T.any(), -jax.nn.log_softmax(logits)[-1], 0)

            segment_M = jnp.arange(1, 1 + query_BMD.shape[1])
            of_row = jax.vmap(nll, in_axes=(0, 0, 0, None, None))
            of_batch = jax.vmap(of_row, in_axes=(0, 0, None, 0, 0))
            segment_BT, document_BT = batch['a/segments'], batch['a/document']
            each_BM = of_batch(query_BMD, key_BMD, segment_M, segment_BT, document_BT)
            return jnp.sum(each_BM) / jnp.sum(segment_BT.max(axis=1)), key_BMD

        (loss, key_BMD), grads = jax.value_and_grad(total, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        averaged = jax.tree.map(lambda a, p: 0.7 * a + 0.3 * p, averaged, params)
        return loss, key_BMD, params, averaged

    losses = []
    for batch in taken:
        with jax.set_mesh(devices):
            loss, key_BMD, params, averaged = jax.device_get(
                of(
                    *(params, averaged, np.array([k for k, _ in queue])),
                    *(np.array([d for _, d in queue]), place(batch, devices)),
                )
            )
        losses.append(loss)
        for row in range(ROWS):
            for m in range(batch['a/segments'][row].max()):
                document = batch['a/document'][row][batch['a/segments'][row] == m + 1][0]
                place_of = oldest.pop(0)
                oldest.append(place_of)
                queue[place_of] = key_BMD[row, m], document
    return losses, params, averaged, queue


@pytest.mark.slow
def test_steps_equal_those_of_a_list_and_of_eight_devices():
    taken = batches(4)
    pairs = [OBJECTIVE.loss_tokens(batch) for batch in taken]
    assert sum(pairs) > OBJECTIVE.queue and len(set(pairs)) > 1  # it goes round
    losses, params, averaged, queue = expected(taken)
    for name in ('one device', 'fsdp 8'):
        found, (own_params, carried) = run(OBJECTIVE, name, taken)
        np.testing.assert_allclose(
            [loss.total / loss.weight for loss in found], losses, rtol=2e-5, err_msg=name
        )
        assert [loss.weight for loss in found] == pairs
        for one, other in ((own_params, params), (carried['encoder'], averaged)):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), one, other)
        np.testing.assert_allclose(carried[QUEUE], [k for k, _ in queue], atol=2e-5)
        assert carried[DOCUMENTS].tolist() == [d for _, d in queue]
        assert carried[NEXT] == sum(pairs) % OBJECTIVE.queue


@pytest.mark.parametrize('n_valid', [0, 3, 7, 12])
def test_the_oldest_keys_give_way(n_valid):
    """Also where a batch has more pairs than there are places, whose last ones stay."""
    Q, D, start = 7, 4, 5
    rng = np.random.default_rng(0)
    valid = np.zeros((6, 2), bool)
    valid.flat[rng.choice(12, n_valid, replace=False)] = True
    keys, ids = rng.normal(size=(6, 2, D)).astype(np.float32), np.arange(100, 112).reshape(6, 2)
    queue, held = rng.normal(size=(Q, D)).astype(np.float32), np.arange(Q)
    want, wanted = queue.copy(), held.copy()
    for i, at in enumerate(zip(*np.nonzero(valid), strict=True)):
        want[(start + i) % Q], wanted[(start + i) % Q] = keys[at], ids[at]
    carried = {QUEUE: queue, DOCUMENTS: held, NEXT: np.int32(start)}
    devices = make_mesh('one device')
    with jax.set_mesh(devices):
        carried = jax.device_put(carried, layout.shardings(carried, devices))
        batch = place({'key_BMD': keys, 'document_BM': ids, 'valid_BM': valid}, devices)
        found = enqueued(carried, **batch)
    np.testing.assert_array_equal(found[QUEUE], want)
    np.testing.assert_array_equal(found[DOCUMENTS], wanted)
    assert found[NEXT] == (start + n_valid) % Q


@pytest.mark.slow
def test_with_the_batch_itself_in_the_queue_it_is_infonce_in_one_direction():
    """Momentum 0, nothing learnt, and the same batch again: negatives are the other texts of the
    batch."""
    (batch,) = batches(1)
    n = OBJECTIVE.loss_tokens(batch)
    objective = MomentumContrast(queue=n, momentum=0.0, temperature=0.2)
    params, carried = begun(objective)
    devices = make_mesh('one device')
    with jax.set_mesh(devices):
        placed = place(batch, devices)
        how = {'extra': {}, 'compute': COMPUTE, 'key': None}

        @jax.jit
        def twice(params, carried, batch):
            model = layers.bind(CONFIG, params)
            first = objective.loss(model, batch, context=Context(jnp.int32(0), carried), **how)
            carried = objective.carry(carried, params, first.kept, jnp.int32(0))
            second = objective.loss(model, batch, context=Context(jnp.int32(1), carried), **how)
            vectors = [objective.encode(model, batch, v, compute=COMPUTE, key=None) for v in 'ab']
            held_out = objective.loss(model, batch, context=Context(None, carried), **how)
            plain = InfoNCE(temperature=0.2).loss(model, batch, **how)
            return second, vectors, held_out, plain

        again, (a_BMD, b_BMD), held_out, plain = jax.device_get(twice(params, carried, placed))
    segment_BT = batch['a/segments']
    pairs = [(b, m) for b in range(ROWS) for m in range(segment_BT[b].max())]
    ids = [batch['a/document'][b][segment_BT[b] == m + 1][0] for b, m in pairs]
    a_PD, b_PD = (np.array([x[at] for at in pairs], np.float64) for x in (a_BMD, b_BMD))
    total = 0.0
    for i, (a_D, own) in enumerate(zip(a_PD, ids, strict=True)):
        kept = [j for j in range(n) if j == i or ids[j] != own]
        logits = b_PD[kept] @ a_D / 0.2
        total += np.log(np.exp(logits).sum()) - logits[kept.index(i)]
    np.testing.assert_allclose(again.total, total, rtol=1e-5)
    # Without a queue, as in a validation, it is InfoNCE's.
    np.testing.assert_allclose(held_out.total, plain.total, rtol=1e-6)


def test_settings_that_cannot_be_are_refused():
    for refused, match in (
        (lambda: MomentumContrast(queue=0), 'queue'),
        (lambda: MomentumContrast(views='shared'), "views 'shared'"),
        (lambda: MomentumContrast(momentum=1.0), 'momentum'),
        (lambda: MomentumContrast(temperature=-1.0), 'temperature'),
        (lambda: MomentumContrast(learned=True).check(CONFIG), 'learned has no effect'),
        (lambda: MomentumContrast().check(SimpleNamespace(dropout=0, encoder_layers=1)), 'enc'),
    ):
        with pytest.raises(UserError, match=match) as error:
            refused()
        assert '\n' not in str(error.value)

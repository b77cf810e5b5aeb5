"""InfoNCE against loops over pairs in float64, and its views."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout
from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.contrastive import InfoNCE
from tests.objectives import texts
from tests.objectives.pairs import make_mesh, oracle, place

CONFIG = ModelConfig(
    vocab=64, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=24, context=64, dropout=0.1
)
COMPUTE = Compute(attention='reference', unroll=1)
SEQ_LEN = 32


def documents(n, *, length=(20, 60), seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, CONFIG.vocab, random.integers(*length)) for _ in range(n)]


def pack(objective, documents, *, rows, seq_len=SEQ_LEN, seed=0):
    """A batch of as many pairs as `rows` rows hold, of the documents over and over."""

    def examples():
        for k in itertools.count():
            rng = np.random.default_rng([seed, k])
            yield from pieces.examples(
                objective,
                documents[k % len(documents)],
                tokenizer=None,
                seq_len=seq_len,
                rng=rng,
            )

    return texts.packed(examples(), objective, seq_len=seq_len, rows=rows, pad_id=0)


@functools.cache
def parameters(name):
    devices = make_mesh(name)
    return layers.create(CONFIG, jax.random.key(0), devices)


class Lookup:
    """The smallest encoder: the vector of a token is a row of a table."""

    def __init__(self, table_VD):
        self.table_VD = table_VD

    def features(self, token_BT, **_):
        return self.table_VD.at[token_BT].get(out_sharding=layout.act('BTD')), None


def pairs_of(batch):
    """Row, segment of every pair, in order."""
    segment_BT = batch['a/segments']
    return [(b, s + 1) for b in range(len(segment_BT)) for s in range(segment_BT[b].max())]


def vectors_of(batch, view, table_VD):
    """Unit vectors of the pairs [P, D]: the mean over the tokens of each, one by one."""
    vectors = []
    for row, segment in pairs_of(batch):
        tokens = batch[f'{view}/inputs'][row][batch[f'{view}/segments'][row] == segment]
        mean_D = table_VD[tokens].astype(np.float64).mean(0)
        vectors.append(mean_D / np.linalg.norm(mean_D))
    return np.array(vectors)


def test_loss_of_a_packed_batch_equals_loops_over_its_pairs():
    """Pooling, places, documents and the learned temperature."""
    objective = InfoNCE(temperature=0.2, learned=True)
    batch = pack(objective, documents(7, length=(10, 40)), rows=8)  # and then from the beginning
    table_VD = np.random.default_rng(1).normal(size=(CONFIG.vocab, 8)).astype(np.float32)
    ids = [
        batch['a/document'][row][batch['a/segments'][row] == segment][0]
        for row, segment in pairs_of(batch)
    ]
    assert 2 < len(set(ids)) < len(ids)
    assert max(batch['a/segments'].max(1)) > 1

    def total(table_VD, extra, batch):
        loss = objective.loss(Lookup(table_VD), batch, extra=extra, compute=COMPUTE, key=None)
        return loss.total, loss

    devices = make_mesh('fsdp 8')
    with jax.set_mesh(devices):
        extra = objective.extra(CONFIG, jax.random.key(0))
        gradient = jax.jit(jax.grad(total, argnums=1, has_aux=True))
        dextra, loss = jax.device_get(gradient(table_VD, extra, place(batch, devices)))
    a_PD, b_PD = (vectors_of(batch, view, table_VD) for view in 'ab')
    want = oracle(a_PD, b_PD, ids, 0.2)
    assert loss.weight == objective.loss_tokens(batch) == len(ids)
    np.testing.assert_allclose(loss.total, want['total'], rtol=1e-5)
    np.testing.assert_allclose(loss.metrics['accuracy'], want['correct'], rtol=1e-6)
    assert loss.metrics['candidates'] == want['candidates']
    np.testing.assert_allclose(loss.metrics['alignment'], want['alignment'], rtol=1e-5)
    np.testing.assert_allclose(
        loss.metrics['uniformity'] / loss.weight, want['uniformity'], rtol=1e-5
    )
    np.testing.assert_allclose(loss.metrics['temperature'] / loss.weight, 0.2, rtol=1e-6)
    np.testing.assert_allclose(dextra['log_temperature'], want['dlog_temperature'], rtol=1e-5)


def test_learned_temperature_has_a_bound_which_it_can_leave():
    objective = InfoNCE(learned=True)
    devices = make_mesh('one device')
    batch = place(pack(objective, documents(8), rows=4), devices)
    table_VD = np.random.default_rng(1).normal(size=(CONFIG.vocab, 8)).astype(np.float32)
    with jax.set_mesh(devices):

        @jax.jit
        @jax.value_and_grad
        def total(log_temperature):
            extra = {'log_temperature': log_temperature}
            model = Lookup(jnp.asarray(table_VD))
            return objective.loss(model, batch, extra=extra, compute=COMPUTE, key=None).total

        (at, d_at), (below, d_below), (above, _) = (
            total(jnp.log(jnp.float32(t))) for t in (0.01, 0.001, 0.02)
        )
    assert at == below != above
    assert d_at == pytest.approx(d_below) and d_at != 0


# The whole encoder.


@functools.cache
def sums_and_gradients(objective, name):
    """Of a packed batch of 16 rows under the real model; no dropout."""
    devices = make_mesh(name)
    batch = pack(objective, documents(12, length=(10, 40)), rows=16)

    def total(params, batch):
        loss = objective.loss(
            layers.bind(CONFIG, params), batch, extra={}, compute=COMPUTE, key=None
        )
        return loss.total, loss

    with jax.set_mesh(devices):
        params = parameters(name)
        gradient = jax.jit(jax.grad(total, has_aux=True))
        return jax.device_get(gradient(params, place(batch, devices)))


@pytest.mark.slow
@pytest.mark.parametrize(('chunks', 'name'), [(1, 'fsdp 8'), (2, 'fsdp 8'), (4, 'one device')])
def test_devices_and_chunks_change_neither_loss_nor_gradients(chunks, name):
    dparams, loss = sums_and_gradients(InfoNCE(chunks=chunks), name)
    want_dparams, want = sums_and_gradients(InfoNCE(), 'one device')
    assert want.total > 1 and want.weight > 16
    # Sums in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), loss, want)
    size = max(np.abs(x).max() for x in jax.tree.leaves(want_dparams))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * size), dparams, want_dparams
    )


@pytest.mark.slow
def test_chunks_need_less_memory():
    devices = make_mesh('one device')

    def temporary_bytes(chunks):
        objective = InfoNCE(chunks=chunks)
        batch = place(pack(objective, documents(8), rows=32, seq_len=128), devices)

        def total(params, batch):
            model = layers.bind(CONFIG, params)
            return objective.loss(model, batch, extra={}, compute=COMPUTE, key=None).total

        program = jax.jit(jax.grad(total)).lower(layers.abstract(CONFIG), batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    with jax.set_mesh(devices):
        assert temporary_bytes(8) < temporary_bytes(1) / 3


def test_chunks_that_do_not_divide_the_rows_are_refused():
    batch = pack(InfoNCE(), documents(8), rows=16)
    devices = make_mesh('fsdp 8')
    with jax.set_mesh(devices), pytest.raises(UserError, match='4 chunks of a batch of 16 rows'):
        InfoNCE(chunks=4).loss(
            Lookup(jnp.zeros((64, 8))),
            place(batch, devices),
            extra={},
            compute=COMPUTE,
            key=None,
        )


@pytest.mark.slow
@pytest.mark.parametrize('chunks', [1, 2])
def test_views_have_dropout_masks_of_their_own(chunks):
    devices = make_mesh('one device')
    batch = pack(InfoNCE(views='dropout'), documents(8), rows=4)
    np.testing.assert_array_equal(batch['a/inputs'], batch['b/inputs'])
    batch, params = place(batch, devices), parameters('one device')

    def alignment(key, *, same):
        objective = InfoNCE(views='dropout', same_dropout=same, chunks=chunks)
        model = layers.bind(CONFIG, params)
        loss = objective.loss(model, batch, extra={}, compute=COMPUTE, key=key)
        return loss.metrics['alignment'] / loss.weight

    with jax.set_mesh(devices):
        apart, same = jax.jit(lambda key: (alignment(key, same=False), alignment(key, same=True)))(
            jax.random.key(1)
        )
    assert apart > 1e-3
    assert same == 0


@pytest.mark.parametrize('bidirectional', [True, False])
def test_a_view_sees_no_neighbour(bidirectional):
    objective = InfoNCE(bidirectional=bidirectional)
    batch = pack(objective, documents(8, length=(10, 20)), rows=2)
    first_BT, second_BT = batch['a/segments'] == 1, batch['a/segments'] == 2
    assert second_BT.any()
    devices = make_mesh('one device')
    with jax.set_mesh(devices):
        model = layers.bind(CONFIG, parameters('one device'))
        encode = jax.jit(
            lambda batch: objective.encode(model, batch, 'a', compute=COMPUTE, key=None)
        )

        def changed(where_BT):
            token_BT = np.where(where_BT, (batch['a/inputs'] + 1) % 64, batch['a/inputs'])
            return encode(place({**batch, 'a/inputs': token_BT}, devices))

        before_BMD, after_BMD, own_BMD = (
            np.asarray(changed(where_BT)) for where_BT in (False, second_BT, first_BT)
        )
    np.testing.assert_array_equal(before_BMD[:, 0], after_BMD[:, 0])
    assert (before_BMD[:, 1] != after_BMD[:, 1]).any()
    assert (before_BMD[:, 0] != own_BMD[:, 0]).all(-1).any()
    np.testing.assert_allclose(np.linalg.norm(before_BMD[:, 0], axis=-1), 1, rtol=1e-6)


def test_a_row_holds_no_more_pairs_than_it_has_places():
    objective = InfoNCE()
    batch = pack(objective, documents(64, length=(2, 6)), rows=4)
    assert batch['a/segments'].max() == objective.segments(SEQ_LEN) == 4


def test_settings_that_cannot_be_are_refused():
    for refused, match in (
        (lambda: InfoNCE(temperature=0.0), 'temperature'),
        (lambda: InfoNCE(chunks=0), 'chunks'),
        (lambda: InfoNCE(delete=1.0), 'delete is 1.0'),
        (lambda: InfoNCE(views='dropout', delete=0.1), "no effect with views 'dropout'"),
        (lambda: InfoNCE(views='shared', bidirectional=False).check(CONFIG), "with views 'shared'"),
        (lambda: InfoNCE(same_dropout=True).check(SimpleNamespace(dropout=0.0)), 'same-dropout'),
        (lambda: InfoNCE().lengths(33), 'even'),
        (lambda: InfoNCE(views='dropout').check(SimpleNamespace(dropout=0.0)), 'model.dropout'),
        (lambda: InfoNCE().check(SimpleNamespace(dropout=0.0, encoder_layers=2)), 'encoder'),
    ):
        with pytest.raises(UserError, match=match) as error:
            refused()
        assert '\n' not in str(error.value)
    InfoNCE(views='dropout').check(CONFIG)
    same = InfoNCE(views='dropout', same_dropout=True)
    same.check(SimpleNamespace(dropout=0.0, encoder_layers=0))
    assert InfoNCE(bidirectional=False).causal and not InfoNCE().causal
    assert not InfoNCE().accumulates
    assert sum(InfoNCE().lengths(64).values()) == 64

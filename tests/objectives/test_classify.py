"""Classification: what the head reads, its loss by hand, labels, and weights of classes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llama_jax import layout, mesh
from llama_jax.data.record import BadRecordError, Labelled
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.classify import Classification, shortened
from llama_jax.objectives.flops import features_flops
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.train.run import place
from llama_jax.train.step import loss_of
from tests.objectives import reading
from tests.objectives.records import batch_of, example

TOKENIZER = bytes_tokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
LABELS = ('no', 'yes', 'maybe')
LAST = Classification(labels=LABELS)
ROWS = [
    [Labelled('good', 'yes'), Labelled('a', 'no', 'pair')],
    [Labelled('so so', 'maybe'), Labelled('bad', 'no'), Labelled('fine', 'yes')],
]
SEQ_LEN = 32
PLACED = dataclasses.replace(reading.DECODER, positions='learned')  # not by differences alone


def ids(text):
    return TOKENIZER.encode(text).tolist()


def test_examples():
    made = example(LAST, ROWS[0][0], TOKENIZER)
    assert made['inputs'].tolist() == [BOS, *ids('good'), EOS]
    assert made['label'].tolist() == [1] * 6 and made['weights'].tolist() == [1] * 6
    pair = example(LAST, ROWS[0][1], TOKENIZER)
    assert pair['inputs'].tolist() == [BOS, *ids('a'), EOS, *ids('pair'), EOS]
    cut = example(LAST, Labelled('abcdefgh', 'no', 'pair'), TOKENIZER, room=(8,))
    assert cut['inputs'].tolist() == [BOS, *ids('ab'), EOS, *ids('pa'), EOS]


def test_the_longest_is_cut_first():
    for a in range(1, 7):
        for b in range(1, 7):
            for room in range(2, 14):
                one, other = map(len, shortened((np.zeros(a), np.zeros(b)), room))
                assert one + other <= room
                if a + b <= room:
                    assert (one, other) == (a, b)
                else:
                    assert one + other >= room - 1
                    assert one in (a, other) or other == b
                    assert max(one, other) - min(one, other) <= abs(a - b)


@functools.cache
def parameters(config, shards):
    devices = mesh.make(MeshConfig(), jax.devices()[:shards])
    host = jax.device_get(layers.create(config, jax.random.key(0), reading.devices()))
    placed = jax.tree.map(jax.device_put, host, layout.shardings(host, devices))
    return devices, placed


HEAD = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def run(objective, config, batch, *, key=None, shards=1):
    devices, params = parameters(config, shards)
    head = jax.device_put(HEAD, layout.shardings({'head_DC': HEAD}, devices)['head_DC'])

    @jax.jit
    def of(params, batch):
        def total(params):
            loss = loss_of(config, objective, params, batch, compute=reading.COMPUTE, key=key)
            return loss.total, loss

        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(params)
        return loss, grads

    with jax.set_mesh(devices):
        made = of({**params, 'objective': {'head_DC': head}}, place(batch, devices))
        return jax.device_get(made)


@functools.cache
def _features(config, causal):
    def of(params, batch):
        model = layers.bind(config, params)
        seen = {'compute': reading.COMPUTE}
        if config.encoder_layers:
            return model.encode(batch['inputs'], segment_BS=batch['segments'], **seen).x_BSD
        seen['segment_BT'] = batch['segments']
        return model.features(batch['inputs'], causal=causal, **seen)[0]

    return jax.jit(of)


def by_hand(objective, config):
    """Sums over texts in float64, each text in a row of its own."""
    devices, params = parameters(config, 1)
    records = [record for row in ROWS for record in row]
    alone = batch_of(objective, [[record] for record in records], TOKENIZER, seq_len=SEQ_LEN)
    with jax.set_mesh(devices):
        x_BTD = _features(config, objective.causal)(params, place(alone, devices))
    total = weight = right = 0.0
    for x_TD, record, segment_T in zip(
        np.asarray(x_BTD, np.float64), records, alone['segments'], strict=True
    ):
        x_TD = x_TD[: segment_T.sum()]
        logit_C = {'last': x_TD[-1], 'first': x_TD[0], 'mean': x_TD.mean(0)}[objective.pool] @ HEAD
        label = LABELS.index(record.label)
        class_weight = (objective.class_weights or (1.0,) * 3)[label]
        total += class_weight * (np.log(np.exp(logit_C).sum()) - logit_C[label])
        right += class_weight * (logit_C.argmax() == label)
        weight += class_weight
    return total, weight, right


@pytest.mark.slow
@pytest.mark.parametrize(
    ('settings', 'config'),
    [
        ({}, reading.DECODER),
        ({'pool': 'mean', 'balance': 'given', 'class_weights': (0.5, 2.0, 3.0)}, PLACED),
        ({'pool': 'first', 'bidirectional': True}, reading.DECODER),
        ({'pool': 'first'}, reading.BOTH),
    ],
    ids=['last', 'mean', 'first', 'encoder'],
)
def test_loss_of_packed_texts_is_that_of_each_by_hand(settings, config):
    objective = dataclasses.replace(LAST, **settings)
    objective.check(config)
    batch = batch_of(objective, ROWS, TOKENIZER, seq_len=SEQ_LEN)
    loss, grads = run(objective, config, batch)
    total, weight, right = by_hand(objective, config)
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    np.testing.assert_allclose([loss.weight, loss.metrics['accuracy']], [weight, right], rtol=1e-6)
    assert objective.loss_tokens(batch) == 5
    assert np.abs(grads['objective']['head_DC']).max() > 0
    untouched = grads['blocks' if config.encoder_layers else 'head_VD']  # no part of what is read
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(untouched))


@pytest.mark.slow
def test_sharded_loss_and_gradients():
    rows = [*ROWS, *ROWS, *ROWS, *ROWS]
    batch = batch_of(LAST, rows, TOKENIZER, seq_len=SEQ_LEN)
    (loss, grads), (sharded, sharded_grads) = (
        run(LAST, reading.DECODER, batch, shards=shards) for shards in (1, 8)
    )
    np.testing.assert_allclose(sharded.total, loss.total, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(sharded_grads), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-8


@pytest.mark.slow
def test_dropout_of_the_head():
    batch = batch_of(LAST, ROWS, TOKENIZER, seq_len=SEQ_LEN)
    dropped = dataclasses.replace(LAST, dropout=0.5)
    with_key, without = (
        run(dropped, reading.DECODER, batch, key=key)[0].total for key in (jax.random.key(1), None)
    )
    assert with_key != without  # the model has none of its own


def test_labels_of_the_training_split():
    texts = [Labelled('x', label) for label in ('b', 'a', 'b', 'b', 'c', 'b')]
    filled = Classification().filled(texts)
    assert filled.labels == ('a', 'b', 'c') and filled.class_weights == ()
    balanced = Classification(balance='balanced').filled(texts)
    assert balanced.class_weights == (2.0, 0.5, 2.0)
    assert balanced.filled(texts) == balanced
    given = Classification(labels=('c', 'b', 'a'), balance='balanced').filled(texts)
    assert given.labels == ('c', 'b', 'a')
    assert filled.encoding != given.encoding and balanced.encoding == filled.encoding
    assert filled.extra(reading.DECODER, jax.random.key(0))['head_DC'].shape == (16, 3)
    with pytest.raises(UserError, match="label 'x'.*nothing to tell apart"):
        Classification().filled([Labelled('x', 'x')])
    with pytest.raises(UserError, match="the label 'c' is none of 'a', 'b'"):
        Classification(labels=('a', 'b')).filled(texts)
    with pytest.raises(UserError, match="no text of the training split has the label 'd'"):
        Classification(labels=('a', 'b', 'c', 'd'), balance='balanced').filled(texts)


@pytest.mark.parametrize(
    ('record', 'said'),
    [
        (Labelled('x', 'perhaps'), "the label 'perhaps' is none of 'no', 'yes', 'maybe'"),
        (Labelled(' ', 'yes'), 'text is empty'),
        (Labelled('x', 'yes', ''), 'other is empty'),
    ],
)
def test_bad_records_are_refused(record, said):
    with pytest.raises(BadRecordError, match=said):
        LAST.encoded(record, vocabulary=TOKENIZER, chat=None)


@pytest.mark.parametrize(
    ('settings', 'encoder', 'said'),
    [
        ({'labels': ()}, 0, 'not known'),
        ({'labels': ('a',)}, 0, "one class only, 'a'"),
        ({'labels': ('a', 'a')}, 0, 'twice'),
        ({'dropout': 1.0}, 0, r'in \[0, 1\)'),
        ({'class_weights': (1.0, 1.0, 1.0)}, 0, 'no effect'),
        ({'balance': 'given'}, 0, '0 class weights for 3 labels'),
        ({'balance': 'given', 'class_weights': (1.0, 0.0, 1.0)}, 0, 'positive'),
        ({'pool': 'first'}, 0, 'sees nothing'),
        ({'bidirectional': True}, 1, 'bidirectional has no effect'),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, encoder, said):
    sizes = {'dim': 8, 'layers': 1, 'heads': 1, 'kv_heads': 1, 'head_dim': 8, 'ffn': 8}
    model = ModelConfig(vocab=1, context=8, encoder_layers=encoder, **sizes)
    with pytest.raises(UserError, match=said):
        dataclasses.replace(LAST, **settings).check(model)


def test_many_labels_are_not_all_named():
    many = Classification(labels=tuple(map(str, range(30))))
    with pytest.raises(BadRecordError, match="'19' and 10 more$"):
        many.encoded(Labelled('x', 'y'), vocabulary=TOKENIZER, chat=None)


def test_flops_are_those_of_what_is_read():
    decoder = reading.DECODER
    assert LAST.flops(decoder, 32) == features_flops(decoder, 32, causal=True)
    bidirectional = dataclasses.replace(LAST, bidirectional=True)
    assert bidirectional.flops(decoder, 32) == features_flops(decoder, 32, causal=False)
    assert LAST.flops(reading.BOTH, 32) == features_flops(decoder, 32, causal=False)

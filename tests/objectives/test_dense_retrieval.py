"""Dense retrieval against loops over queries in float64, and what an example is."""

import functools

import jax
import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.data.record import BadRecordError, QueryPassages
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives import info_nce
from llama_jax.objectives.dense_retrieval import DenseRetrieval
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from tests.objectives.pairs import make_mesh, place
from tests.objectives.records import batch_of, example
from tests.objectives.test_contrastive import Lookup

BYTES = bytes_tokenizer()
BOS = BYTES.bos_id
OBJECTIVE = DenseRetrieval(negatives=2, temperature=0.3)
COMPUTE = Compute(attention='reference', unroll=1)
TINY = ModelConfig(
    vocab=BYTES.vocab_size, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=24, context=64
)
ROWS = [
    [QueryPassages('ab', ('cde',), ('fg', 'h')), QueryPassages('kj', ('kl',))],
    [QueryPassages('mn', ('cde',), ('op',))],  # the passage of another query
    [QueryPassages('ab', ('qr',), ('st', 'kl'))],  # the query of another record
    [QueryPassages('wv', ('wx',), ('yz', 'qr', 'hh'))],
    *[[QueryPassages(f'{i} a', (f'{i} bc',), (f'd{i}', 'ef'))] for i in range(3)],
    [],
]


def spelled(example):
    """The texts of an example."""
    return [
        BYTES.decode(example['inputs'][example['text'] == n])
        for n in range(example['text'].max() + 1)
    ]


def unit(text, table_VD):
    mean_D = table_VD[[BOS, *BYTES.encode(text)]].astype(np.float64).mean(0)
    return mean_D / np.linalg.norm(mean_D)


def expected(table_VD, records):
    """Loss, accuracy and candidates, summed over (query, positive, negatives)."""
    total = correct = candidates = 0.0
    for query, own, _ in records:
        cos = {'own': unit(query, table_VD) @ unit(own, table_VD)}
        for i, (other, positive, negatives) in enumerate(records):
            if other != query and positive != own:
                cos[i] = unit(query, table_VD) @ unit(positive, table_VD)
            for n, negative in enumerate(negatives):
                if negative != own:
                    cos[i, n] = unit(query, table_VD) @ unit(negative, table_VD)
        logits = np.array([*cos.values()]) / OBJECTIVE.temperature
        total += np.log(np.exp(logits).sum()) - logits[0]
        correct += logits[0] >= logits.max()
        candidates += len(logits)
    return total, correct, candidates


def test_loss_equals_loops_over_queries_and_flows_to_other_devices(monkeypatch):
    """Places, duplicates, several blocks of rows on each device."""
    monkeypatch.setattr(info_nce, 'BLOCK', 2)
    batch = batch_of(OBJECTIVE, ROWS, BYTES, seq_len=32)
    drawn = [
        spelled({name: x[row][batch['segments'][row] == segment] for name, x in batch.items()})
        for row in range(8)
        for segment in range(1, batch['segments'][row].max() + 1)
    ]
    records = [(query, own, negatives) for query, own, *negatives in drawn]
    assert len(records) == 8 and len(records[4][2]) == 2
    rng = np.random.default_rng(1)
    table_VD, towards_VD = rng.normal(size=(2, BYTES.vocab_size, 8)).astype(np.float32)

    def total(table_VD, batch):
        loss = OBJECTIVE.loss(Lookup(table_VD), batch, extra={}, compute=COMPUTE, key=None)
        return loss.total, loss

    devices = make_mesh('fsdp 8')
    with jax.set_mesh(devices):
        gradient = jax.jit(jax.grad(total, has_aux=True))
        dtable_VD, loss = jax.device_get(gradient(table_VD, place(batch, devices)))
    want, correct, candidates = expected(table_VD, records)
    assert loss.weight == OBJECTIVE.loss_tokens(batch) == len(records)
    np.testing.assert_allclose(loss.total, want, rtol=1e-5)
    assert 0 < correct < len(records)
    assert loss.metrics['accuracy'] == correct
    assert (
        loss.metrics['candidates']
        == candidates
        < len(records) * sum(1 + len(negatives) for _, _, negatives in records)
    )
    along = [expected(table_VD + step * towards_VD, records)[0] for step in (-1e-4, 1e-4)]
    np.testing.assert_allclose(
        np.vdot(dtable_VD, towards_VD), (along[1] - along[0]) / 2e-4, rtol=1e-3
    )


@functools.cache
def loss_of(bidirectional=True):
    objective = DenseRetrieval(negatives=2, bidirectional=bidirectional, chunks=2)
    devices = make_mesh('one device')
    with jax.set_mesh(devices):
        params = layers.create(TINY, jax.random.key(0), devices)

        @jax.jit
        def loss(batch):
            model = layers.bind(TINY, params)
            return objective.loss(model, batch, extra={}, compute=COMPUTE, key=None).total

    def of(rows):
        batch = batch_of(objective, rows, BYTES, seq_len=32)
        with jax.set_mesh(devices):
            return float(loss(place(batch, devices)))

    return of


def test_texts_are_read_each_by_itself():
    """Neither the neighbours in a row nor the place in it change a vector."""
    one, other = ROWS[0]
    packed = loss_of()([[one, other], []])
    assert packed > 0.1
    assert loss_of()([[one], [other]]) == pytest.approx(packed, rel=1e-5)
    assert loss_of()([[other], [one]]) == pytest.approx(packed, rel=1e-5)


def test_an_example_draws_of_positives_and_negatives():
    record = QueryPassages('query', ('one', 'two'), ('a', 'b', 'c'))
    objective = DenseRetrieval(negatives=2, query_prefix='Q: ', passage_prefix='P: ')
    encoded = objective.encoded(record, vocabulary=BYTES, chat=None)
    assert encoded.number == 2 and [len(part) for part in encoded.parts] == [9, 7, 7, 5, 5, 5]
    sizes = objective.whole((9, 7, 7, 5, 5, 5, 0), seq_len=64)
    assert sizes == (9 + 7 + 7 + 5,)  # the longest that may be drawn
    seen = set()
    for seed in range(40):
        made = objective.example(
            pieces.Piece(np.zeros(0, np.int32), 0, 0, 0.5, sizes, 0, encoded),
            tokenizer=BYTES,
            seq_len=64,
            rng=np.random.default_rng(seed),
        )
        query, positive, *negatives = spelled(made)
        assert query == 'Q: query' and len(set(negatives)) == 2
        assert (made['offset'][np.diff(made['text'], prepend=-1) != 0] == 0).all()
        assert made['offset'].max() == 8
        seen |= {positive, *negatives}
    assert seen == {'P: one', 'P: two', 'P: a', 'P: b', 'P: c'}
    assert len(objective.encoding) == 3


def test_texts_that_are_cut_stay_the_texts_that_they_were():
    record = QueryPassages('q', ('long passage',), ('long negative',))
    objective = DenseRetrieval()
    whole, cut = (example(objective, record, BYTES, room=(n,)) for n in (64, 16))
    assert [len(text) for text in spelled(cut)] == [1, 6, 6]
    assert np.unique(cut['identity']).tolist() == np.unique(whole['identity']).tolist()
    assert example(objective, record, BYTES, room=(2,)) is None
    short = DenseRetrieval(longest=4).encoded(record, vocabulary=BYTES, chat=None)
    assert [len(part) for part in short.parts] == [2, 4, 4]


def test_a_row_holds_no_more_queries_than_it_has_places():
    assert DenseRetrieval(negatives=1).segments(1024) == 1024 // 24
    assert DenseRetrieval(negatives=30).segments(64) == 4


def test_settings_that_cannot_be_are_refused():
    for refused, match in (
        (lambda: DenseRetrieval(negatives=-1), 'negatives'),
        (lambda: DenseRetrieval(temperature=0.0), 'temperature'),
        (lambda: DenseRetrieval(longest=-1), 'longest'),
        (lambda: DenseRetrieval(chunks=0), 'chunks'),
        (lambda: DenseRetrieval().check(ModelConfig(**vars(TINY) | {'encoder_layers': 1})), 'enc'),
    ):
        with pytest.raises(UserError, match=match) as error:
            refused()
        assert '\n' not in str(error.value)
    with pytest.raises(BadRecordError, match='no token'):
        DenseRetrieval(longest=1).encoded(ROWS[1][0], vocabulary=BYTES, chat=None)
    assert DenseRetrieval(bidirectional=False).causal and not DenseRetrieval().causal

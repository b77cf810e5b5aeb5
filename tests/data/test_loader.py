import dataclasses
import itertools
import threading

import numpy as np
import pytest

from llama_jax.data import order, sources
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.loader import Loader
from llama_jax.errors import UserError
from tests.data import objective
from tests.data.corpus import CHINESE

BATCH, SEQ_LEN = 8, 96


def load(config, tokenizer, *, hosts=1, host=0, example=objective.causal, **settings):
    defaults = dict(
        split='train',
        tokenizer=tokenizer,
        example=example,
        splittable=example is objective.causal,
        batch=BATCH,
        seq_len=SEQ_LEN,
        seed=3,
    )
    each = (defaults | settings)['batch'] // hosts
    defaults['rows'] = range(host * each, (host + 1) * each)
    return Loader(config, **(defaults | settings))


def take(loader, count):
    with loader:
        return list(itertools.islice(loader, count))


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, wanted in zip(batches, expected, strict=True):
        assert batch.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_array_equal(batch[key], wanted[key], err_msg=key)


def joined(parts):
    """Global batches from those of the hosts."""
    return [
        {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for batches in zip(*parts, strict=True)
    ]


@pytest.fixture(scope='module')
def mixture(modules, tmp_path_factory):
    """Code and Chinese, 3 : 1; with far fewer Chinese documents than rows in a batch."""
    path = tmp_path_factory.mktemp('chinese')
    for i, text in enumerate(CHINESE[:3]):
        (path / f'{i}.txt').write_text(text, 'utf-8')
    return DataConfig(
        sources=(
            Source('text_files', weight=3, files=(f'{modules}/*.py',)),
            Source('text_files', weight=1, files=(f'{path}/*.txt',)),
        )
    )


@pytest.fixture(scope='module', params=['causal', 'chunks'])
def example(request):
    return getattr(objective, request.param)


def test_shapes_and_types(config, tokenizer, example):
    (batch,) = take(load(config, tokenizer, example=example), 1)
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        'inputs': (np.int32, (BATCH, SEQ_LEN)),
        'targets': (np.int32, (BATCH, SEQ_LEN)),
        'weights': (np.float32, (BATCH, SEQ_LEN)),
        'segments': (np.int32, (BATCH, SEQ_LEN)),
        'positions': (np.int32, (BATCH, SEQ_LEN)),
        'cursor': (np.int32, (BATCH, 2)),
    }


def test_a_lane_reads_every_batch_th_document_of_the_stream(config, tokenizer):
    batches = take(load(config, tokenizer), 30)
    corpus = sources.open_sources(config, 'train')
    stream = order.training_order(corpus.sizes, corpus.weights, seed=3)
    for lane in (0, BATCH - 1):
        row = np.concatenate([batch['inputs'][lane] for batch in batches])
        text = tokenizer.decode(row)
        lane_text = ''
        for k in itertools.count():
            source, _, record = stream[lane + k * BATCH]
            lane_text += corpus.sources[source][record]
            if len(lane_text) > len(text):
                break
        assert len(text) > 3000
        # The last token may hold the beginning of a character only.
        assert lane_text.startswith(text.rstrip('\ufffd'))


def test_targets_are_the_next_inputs_within_a_segment(config, tokenizer):
    for batch in take(load(config, tokenizer), 4):
        same = batch['segments'][:, 1:] == batch['segments'][:, :-1]
        np.testing.assert_array_equal(batch['targets'][:, :-1][same], batch['inputs'][:, 1:][same])
        assert (batch['segments'] > 0).all()


@pytest.mark.parametrize('hosts', [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(mixture, tokenizer, example, hosts):
    expected = take(load(mixture, tokenizer, example=example), 12)
    parts = [
        take(load(mixture, tokenizer, example=example, hosts=hosts, host=h), 12)
        for h in range(hosts)
    ]
    assert parts[0][0]['inputs'].shape == (BATCH // hosts, SEQ_LEN)
    assert_equal(joined(parts), expected)


def test_resuming_anywhere_with_other_hosts_and_prefetch_gives_the_same_batches(
    mixture, tokenizer, example
):
    expected = take(load(mixture, tokenizer, example=example), 16)
    other = dataclasses.replace(mixture, prefetch=0)
    for done in (1, 7, 15):
        cursor = expected[done - 1]['cursor']
        parts = [
            take(load(other, tokenizer, example=example, hosts=2, host=h, cursor=cursor), 16 - done)
            for h in range(2)
        ]
        assert_equal(joined(parts), expected[done:])


def test_worker_processes_give_the_same_batches(mixture, tokenizer):
    expected = take(load(mixture, tokenizer, example=objective.chunks), 12)
    workers = dataclasses.replace(mixture, workers=3)
    resumed = load(workers, tokenizer, example=objective.chunks, cursor=expected[3]['cursor'])
    assert_equal(take(resumed, 8), expected[4:])


def test_randomness_is_keyed_by_record_and_epoch(config, tokenizer):
    """Another batch size moves every document to another place, but not its draws."""

    def draws(batch):
        found = {}
        loader = load(config, tokenizer, example=recorded, batch=batch, seq_len=8)
        for rows in take(loader, 40 // batch):
            keys = rows['record'][rows['segments'] > 0], rows['draw'][rows['segments'] > 0]
            for record, draw in zip(*keys, strict=True):
                found.setdefault(record, []).append(draw)
        return found

    def recorded(tokens, *, tokenizer, seq_len, rng):
        key = np.array([int(tokens[:50].sum()) + len(tokens)], np.int32)
        return [{'record': key, 'draw': rng.integers(0, 10**6, 1).astype(np.int32)}]

    few, many = draws(2), draws(5)
    assert few.keys() == many.keys()
    for record, values in few.items():
        assert len(set(values)) == len(values) > 1  # drawn anew in every epoch
        shared = min(len(values), len(many[record]))
        assert set(values[: shared - 1]) <= set(many[record])


def test_seeds_and_epochs_shuffle_differently(config):
    size = 40
    stream = order.training_order([size], [1.0], seed=1)
    epochs = [[stream[e * size + i] for i in range(size)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for _, e, _ in epoch} == {number}
        assert sorted(record for *_, record in epoch) == list(range(size))
    other = order.training_order([size], [1.0], seed=2)
    orders = [*([r for *_, r in e] for e in epochs), [other[i][2] for i in range(size)]]
    assert len(set(map(tuple, orders))) == 4


def test_mixtures_keep_their_weights():
    stream = order.training_order([30, 10], [3, 1], seed=0)
    drawn = [stream[i] for i in range(400)]
    assert sum(source == 0 for source, *_ in drawn) == 300
    assert len(set(drawn)) == 400  # no document twice in an epoch
    equal = order.training_order([50, 50], [1, 1], seed=0)
    pairs = [equal[i] for i in range(100)]
    by_source = [[r for s, _, r in pairs if s == source] for source in (0, 1)]
    assert by_source[0] != by_source[1]


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_evaluation_reads_every_document_once(config, tokenizer, example, hosts):
    corpus = sources.open_sources(config, 'train')
    texts = [text for source in corpus.sources for text in source]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    parts = [
        take(load(config, tokenizer, example=example, hosts=hosts, host=h, epochs=1), None)
        for h in range(hosts)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = joined(parts)
    weight = sum(batch['weights'].sum() for batch in batches)
    assert weight == tokens + (len(texts) if example is objective.causal else 0)
    counted = [tokenizer.byte_lengths[b['targets']][b['weights'] > 0].sum() for b in batches]
    assert sum(counted) == sum(len(text.encode()) for text in texts)
    assert (batches[-1]['cursor'] == [len(texts), 0]).all()


def test_evaluation_is_in_stored_order_and_resumes(config, tokenizer):
    whole = take(load(config, tokenizer, epochs=1), None)
    rows = np.concatenate([batch['inputs'] for batch in whole])
    text = ''.join(sources.open_sources(config, 'train').sources[0])
    assert tokenizer.decode(rows.ravel()) == text
    rest = take(load(config, tokenizer, epochs=1, cursor=whole[2]['cursor']), None)
    assert_equal(rest, whole[3:])
    twice = take(load(config, tokenizer, epochs=2), None)
    assert sum(b['weights'].sum() for b in twice) == 2 * sum(b['weights'].sum() for b in whole)


def test_fewer_documents_than_hosts(jsonl, own_cache, tokenizer):
    config = DataConfig(sources=(Source('text_files', files=(str(jsonl(CHINESE[:1])),)),))
    expected = take(load(config, tokenizer), 3)
    assert (expected[0]['segments'] > 0).all()
    parts = [take(load(config, tokenizer, hosts=8, host=h), 3) for h in range(8)]
    assert_equal(joined(parts), expected)
    last = take(load(config, tokenizer, hosts=8, host=7, epochs=1), None)
    assert [batch['weights'].sum() for batch in last] == [0]
    empty = load(config, tokenizer, hosts=8, host=7)
    with empty:
        for key, value in empty.empty_batch().items():
            assert value.shape == last[0][key].shape and value.dtype == last[0][key].dtype
            if key != 'cursor':
                np.testing.assert_array_equal(value, last[0][key])


@pytest.mark.parametrize('epochs', [None, 1])
def test_a_host_may_hold_any_rows(config, tokenizer, epochs):
    """The devices of a host of a pod need not be neighbours in the mesh."""
    expected = take(load(config, tokenizer, epochs=epochs), 4)
    rows = [1, 2, 6]
    with load(config, tokenizer, epochs=epochs, rows=rows) as loader:
        some = list(itertools.islice(loader, 4))
    assert_equal(some, [{key: x[rows] for key, x in batch.items()} for batch in expected])


def test_digest_changes_with_what_decides_the_batches(config, mixture, tokenizer):
    def digest(config=config, **settings):
        with load(config, tokenizer, **settings) as loader:
            return loader.digest

    assert digest() == digest(hosts=2, host=1)
    others = [digest(seed=4), digest(batch=16), digest(seq_len=32), digest(mixture)]
    assert len({digest(), *others}) == 5


def test_bad_settings_are_refused(config, tokenizer):
    with pytest.raises(UserError, match=r'cursor has shape \[4, 2\] and not \[8, 2\]'):
        load(config, tokenizer, cursor=np.zeros((4, 2), np.int32))
    with pytest.raises(UserError, match='batch of 0 rows'):
        load(config, tokenizer, batch=0)
    with pytest.raises(UserError, match='no document gives an example'):
        load(config, tokenizer, example=objective.nothing)
    with (
        load(config, tokenizer, example=objective.too_long) as loader,
        pytest.raises(UserError, match='example of 97 tokens does not fit in a row of 96'),
    ):
        next(loader)


@pytest.mark.parametrize('workers', [0, 2])
def test_errors_reach_the_reader_and_everything_ends(config, tokenizer, workers):
    config = dataclasses.replace(config, workers=workers)
    with (
        load(config, tokenizer, example=objective.FailsLater(), splittable=True) as loader,
        pytest.raises(RuntimeError, match='document four is cursed'),
    ):
        list(loader)


def test_close_ends_the_thread(config, tokenizer):
    before = set(threading.enumerate())  # of earlier tests, some of which may end meanwhile
    loader = load(config, tokenizer)
    next(loader)
    (thread,) = set(threading.enumerate()) - before
    assert thread.is_alive() and loader.seconds_waited > 0
    loader.close()
    loader.close()
    assert not thread.is_alive()
    with pytest.raises(ValueError, match='closed'):
        next(loader)

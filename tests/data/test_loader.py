import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest

from llama_jax.data import sources
from llama_jax.data.config import DataConfig, Source, labels
from llama_jax.data.loader import Loader
from llama_jax.errors import UserError
from tests.data import objective
from tests.data.corpus import CHINESE

BATCH, SEQ_LEN = 8, 96
CAUSAL, NOISY = objective.Causal(), objective.Noisy()


def load(config, tokenizer, *, hosts=1, host=0, maker=CAUSAL, **settings):
    defaults = dict(
        split='train', tokenizer=tokenizer, maker=maker, batch=BATCH, seq_len=SEQ_LEN, seed=3
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
    made = []
    for batches in zip(*parts, strict=True):
        (cursor,) = {batch.pop('cursor') for batch in batches}
        arrays = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        made.append(arrays | {'cursor': cursor})
    return made


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


@pytest.fixture(scope='module', params=[CAUSAL, NOISY], ids=['causal', 'noisy'])
def maker(request):
    return request.param


def test_shapes_and_types(config, tokenizer, maker):
    (batch,) = take(load(config, tokenizer, maker=maker), 1)
    assert isinstance(batch.pop('cursor'), str)
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        'inputs': (np.int32, (BATCH, SEQ_LEN)),
        'targets': (np.int32, (BATCH, SEQ_LEN)),
        'weights': (np.float32, (BATCH, SEQ_LEN)),
        'segments': (np.int32, (BATCH, SEQ_LEN)),
        'positions': (np.int32, (BATCH, SEQ_LEN)),
    }


def test_an_epoch_is_every_document_once(config, tokenizer):
    """The text of all segments is the text of the corpus, each token once."""
    (documents,) = sources.open_sources(config, 'train').sources
    wanted = collections.Counter()
    for text in documents:
        wanted.update([*tokenizer.encode(text).tolist(), tokenizer.eos_id])
    with load(config, tokenizer) as loader:
        rows = wanted.total() / SEQ_LEN
        found = collections.Counter()
        for batch in itertools.islice(loader, int(rows // BATCH)):
            found.update(batch['targets'][batch['segments'] > 0].tolist())
        assert not found - wanted
        assert found.total() > 0.97 * (rows - BATCH) * SEQ_LEN
        told = loader.read(batch['cursor'])
    assert told['epochs'] == pytest.approx(found.total() / wanted.total())
    assert 0.9 * len(documents) < told['documents'] <= len(documents)


def test_targets_are_the_next_inputs_within_a_segment(config, tokenizer):
    for batch in take(load(config, tokenizer), 4):
        same = batch['segments'][:, 1:] == batch['segments'][:, :-1]
        same &= batch['segments'][:, 1:] > 0
        np.testing.assert_array_equal(batch['targets'][:, :-1][same], batch['inputs'][:, 1:][same])
        starts = batch['positions'] == 0
        assert (batch['segments'][starts & (batch['inputs'] == tokenizer.bos_id)] > 0).all()


@pytest.mark.parametrize('hosts', [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(mixture, tokenizer, maker, hosts):
    expected = take(load(mixture, tokenizer, maker=maker), 12)
    parts = [
        take(load(mixture, tokenizer, maker=maker, hosts=hosts, host=h), 12) for h in range(hosts)
    ]
    assert parts[0][0]['inputs'].shape == (BATCH // hosts, SEQ_LEN)
    assert_equal(joined(parts), expected)


def test_resuming_anywhere_with_other_hosts_and_prefetch_gives_the_same_batches(
    mixture, tokenizer, maker
):
    expected = take(load(mixture, tokenizer, maker=maker), 16)
    other = dataclasses.replace(mixture, prefetch=0)
    for done in (1, 7, 15):
        cursor = expected[done - 1]['cursor']
        parts = [
            take(load(other, tokenizer, maker=maker, hosts=2, host=h, cursor=cursor), 16 - done)
            for h in range(2)
        ]
        assert_equal(joined(parts), expected[done:])


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(mixture, tokenizer):
    """A Ctrl-C, which the terminal sends to them as well, is no matter of theirs."""
    expected = take(load(mixture, tokenizer, maker=NOISY), 24)
    workers = dataclasses.replace(mixture, workers=3, prefetch=1)
    resumed = load(workers, tokenizer, maker=NOISY, cursor=expected[3]['cursor'])
    first = next(resumed)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert_equal([first, *take(resumed, 19)], expected[4:])


def test_shares_of_a_mixture_are_told(mixture, tokenizer):
    """Code and Chinese 3 : 1 in tokens, though there are far fewer Chinese documents."""
    with load(mixture, tokenizer) as loader:
        told = loader.read(take(loader, 60)[-1]['cursor'])
    names = sorted(name.partition('/')[2] for name in told if name.startswith('epochs/'))
    assert len(names) == 2
    shares = [told[f'share/{name}'] for name in names]
    assert sum(shares) == pytest.approx(1) and max(shares) == pytest.approx(0.75, abs=0.03)
    assert max(told[f'epochs/{name}'] for name in names) > 3


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_evaluation_reads_every_document_once(config, tokenizer, maker, hosts):
    (documents,) = sources.open_sources(config, 'train').sources
    encoded = [tokenizer.encode(text) for text in documents]
    parts = [
        take(load(config, tokenizer, maker=maker, hosts=hosts, host=h, epochs=1), None)
        for h in range(hosts)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = joined(parts)
    weight = sum(batch['weights'].sum() for batch in batches)
    if maker is NOISY:  # a single token left of a document makes no example
        assert weight == pytest.approx(sum(map(len, encoded)), rel=0.001)
        return
    assert weight == sum(map(len, encoded)) + len(encoded)
    counted = [tokenizer.byte_lengths[b['targets']][b['weights'] > 0].sum() for b in batches]
    assert sum(counted) == sum(len(text.encode()) for text in documents)
    whole = take(load(config, tokenizer, epochs=2), None)
    assert sum(b['weights'].sum() for b in whole) == 2 * weight


def test_evaluation_resumes_and_begins_the_same(config, tokenizer):
    whole = take(load(config, tokenizer, epochs=1), None)
    rest = take(load(config, tokenizer, epochs=1, cursor=whole[2]['cursor']), None)
    assert_equal(rest, whole[3:])


def test_fewer_documents_than_hosts(jsonl, own_cache, tokenizer, caplog):
    config = DataConfig(sources=(Source('text_files', files=(str(jsonl(CHINESE[:1])),)),))
    expected = take(load(config, tokenizer), 3)
    assert 'less than a batch of 8 x 96' in caplog.text
    assert (expected[0]['segments'] > 0).all()
    parts = [take(load(config, tokenizer, hosts=8, host=h), 3) for h in range(8)]
    assert_equal(joined(parts), expected)
    last = take(load(config, tokenizer, hosts=8, host=7, epochs=1), None)
    assert [batch['weights'].sum() for batch in last] == [0]
    empty = load(config, tokenizer, hosts=8, host=7)
    with empty:
        for key, value in empty.empty_batch().items():
            if key != 'cursor':
                assert value.shape == last[0][key].shape and value.dtype == last[0][key].dtype
                np.testing.assert_array_equal(value, last[0][key])


def test_a_corpus_that_fills_a_batch_is_not_warned_of(config, tokenizer, caplog):
    take(load(config, tokenizer), 1)
    assert not caplog.text


@pytest.mark.parametrize('epochs', [None, 1])
def test_a_host_may_hold_any_rows(config, tokenizer, epochs):
    """The devices of a host of a pod need not be neighbours in the mesh."""
    expected = take(load(config, tokenizer, epochs=epochs), 4)
    rows = [1, 2, 6]
    with load(config, tokenizer, epochs=epochs, rows=rows) as loader:
        some = list(itertools.islice(loader, 4))
    wanted = [
        {key: x if key == 'cursor' else x[rows] for key, x in batch.items()} for batch in expected
    ]
    assert_equal(some, wanted)


def test_digest_changes_with_what_decides_the_batches(config, mixture, tokenizer):
    def digest(config=config, **settings):
        with load(config, tokenizer, **settings) as loader:
            return loader.digest

    assert digest() == digest(hosts=2, host=1)
    by_documents = dataclasses.replace(mixture, share='documents')
    others = [digest(seed=4), digest(batch=16), digest(seq_len=32), digest(mixture)]
    assert len({digest(), *others, digest(by_documents)}) == 6


def test_bad_settings_are_refused(config, mixture, tokenizer):
    cursor = take(load(mixture, tokenizer), 1)[0]['cursor']
    with pytest.raises(UserError, match='place in the data is of 2 sources, and there are 1'):
        load(config, tokenizer, cursor=cursor)
    with pytest.raises(UserError, match='an older version wrote it'):
        load(config, tokenizer, cursor='[[1, 2], [3, 4]]')
    with pytest.raises(UserError, match='batch of 0 rows'):
        load(config, tokenizer, batch=0)
    with pytest.raises(UserError, match='no document gives an example'):
        load(config, tokenizer, maker=objective.Nothing())


@pytest.mark.parametrize('workers', [0, 2])
def test_errors_reach_the_reader_and_everything_ends(config, tokenizer, workers):
    config = dataclasses.replace(config, workers=workers)
    with (
        load(config, tokenizer, maker=objective.FailsLater()) as loader,
        pytest.raises(RuntimeError, match='this piece is cursed'),
    ):
        list(loader)


def test_labels_are_short_and_no_two_alike():
    named = [
        Source('python_corpus/stdlib_code'),
        Source('text_files', files=('data/books*.jsonl.gz',)),
        Source('text_files', files=('other/books.txt',)),
        Source('text_files', files=('*',), label='三国'),
        Source('text_files', files=('/data/web/**/*.jsonl', 'more/a.txt')),
        Source('text_files', files=('*.txt',)),
        Source('text_files', files=('../notes/',)),
    ]
    assert labels(named) == [
        *('python_corpus_stdlib_code', 'books', 'books-2', '三国', 'web', 'text_files', 'notes')
    ]


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


@pytest.mark.parametrize('name', ['offsets', '00000.tokens'])
@pytest.mark.parametrize('byte', [b'\0', b'\xff'])
def test_tokens_that_were_overwritten_are_told(jsonl, own_cache, tokenizer, name, byte):
    """By the batch that reads them, as of pages that a crash left empty."""
    source = Source('text_files', files=(str(jsonl([*CHINESE, 'text ' * 99])),), split='all')
    config = DataConfig(sources=(source,))
    with load(config, tokenizer, batch=1, epochs=1) as loader:
        assert len(list(loader)) > 1
        (texts,) = loader.texts
    path = texts.directory / name
    path.write_bytes(byte * path.stat().st_size)
    with pytest.raises(UserError, match=f'{path} is damaged .* delete {path.parent};'):
        take(load(config, tokenizer, batch=1, epochs=1), None)

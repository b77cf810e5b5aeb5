import collections
import itertools
import time
import tracemalloc

import numpy as np
import pytest

from llama_jax.data import order
from llama_jax.data.order import Blocks, Stream
from llama_jax.errors import UserError
from tests.data.lengths import Lengths


def blocks(tokens, size, **settings):
    return Blocks(Lengths(tokens).offsets, size, **settings)


@pytest.mark.parametrize('size', [1, 7, 30, 10**6])
def test_blocks_cut_every_document_once(size):
    tokens = np.random.default_rng(0).integers(0, 40, 2500)
    found = blocks(tokens, size)
    assert len(found) == sum(-(-(n + 1) // size) for n in tokens)
    at = dict.fromkeys(range(len(tokens)), 0)
    for document, start, stop in (found[i] for i in range(len(found))):
        assert start == at[document] < stop <= start + size
        at[document] = stop
    assert [*at.values()] == (tokens + 1).tolist()


def test_blocks_of_a_document_are_as_equal_as_can_be():
    assert [blocks([20], 8)[i][1:] for i in range(3)] == [(0, 7), (7, 14), (14, 21)]


def test_block_counts_are_kept_on_disk(tmp_path, monkeypatch):
    kept = tmp_path / 'blocks.npy'
    first = blocks([5, 30, 2], 8, cache=kept)
    monkeypatch.setattr(Blocks, '_count', lambda self: pytest.fail('counted again'))
    assert len(blocks([5, 30, 2], 8, cache=kept)) == len(first) == 1 + 4 + 1
    assert [path.name for path in tmp_path.iterdir()] == ['blocks.npy']


@pytest.mark.parametrize('left', [0, 100, None], ids=['empty', 'cut', 'other'])
def test_damaged_block_counts_are_counted_again(tmp_path, left):
    kept = tmp_path / 'blocks.npy'
    blocks([5, 30, 2], 8, cache=kept)
    whole = kept.read_bytes()
    if left is None:
        np.save(kept, np.arange(9))
    else:
        kept.write_bytes(whole[:left])
    assert len(blocks([5, 30, 2], 8, cache=kept)) == 1 + 4 + 1
    assert kept.read_bytes() == whole


class Endless:
    """Offsets of 400 million documents of 1 to 1,000 tokens, which are nowhere."""

    documents = 400_000_000

    def __len__(self):
        return self.documents + 1

    def __getitem__(self, index):
        i = np.arange(*index.indices(len(self)), dtype=np.int64)
        # 1 + 37 i mod 1000 sums to 500.5 on average.
        whole, rest = np.divmod(i, 1000)
        return whole * 500_500 + _PREFIX[rest]


_PREFIX = np.concatenate([[0], np.cumsum(1 + 37 * np.arange(999) % 1000)])


def test_400_million_documents_take_no_memory(tmp_path, monkeypatch):
    """The count over all documents is read from the file here; it is what a first start makes."""
    groups = -(-Endless.documents // order._GROUP)
    per_thousand = int((-(-(np.diff(_PREFIX) + 1) // 512)).sum()) + 1  # the last of 1000 has 964
    kept = tmp_path / 'blocks.npy'
    np.save(kept, np.arange(groups + 1) * (per_thousand * order._GROUP // 1000))
    tracemalloc.start()
    stream = Stream([Blocks(Endless(), 512, cache=kept)], [1.0], seed=0)
    drawn = [block for block, _ in zip(stream, range(200), strict=False)]
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 8 * 2**20
    assert len({block.document for block in drawn}) == 200
    assert max(block.document for block in drawn) > 300_000_000


def test_every_epoch_has_every_block_once_in_another_order():
    stream = Stream([blocks(np.arange(50), 8)], [1.0], seed=1)
    size = len(stream.sources[0])
    drawn = list(itertools.islice(stream, 3 * size))
    epochs = [drawn[e * size : (e + 1) * size] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {block.epoch for block in epoch} == {number}
        assert len({block[2:] for block in epoch}) == size
    other = list(itertools.islice(Stream(stream.sources, [1.0], seed=2), size))
    orders = [[block[2:] for block in epoch] for epoch in [*epochs, other]]
    assert len({tuple(x) for x in orders}) == 4


@pytest.mark.parametrize('n', [1, 2, 5, 100, order._FEW, order._FEW + 1])
def test_every_number_comes_once_in_each_epoch_and_at_once(n):
    begin = time.process_time()
    shuffled = order.Shuffled(n, seed=3)
    drawn = np.array([[shuffled[epoch * n + i] for i in range(n)] for epoch in range(30)])
    assert (np.sort(drawn) == np.arange(n)).all()
    assert n < 100 or len({tuple(epoch) for epoch in drawn.tolist()}) == 30
    assert [shuffled[n + i] for i in range(n)] == drawn[1].tolist()  # an earlier epoch again
    assert (time.process_time() - begin) / drawn.size < 5e-4


def test_equal_sources_do_not_march_in_step():
    stream = Stream([blocks([5] * 50, 8)] * 2, [1.0, 1.0], seed=0)
    drawn = list(itertools.islice(stream, 100))
    numbers = [[block.document for block in drawn if block.source == s] for s in (0, 1)]
    assert sorted(numbers[0]) == sorted(numbers[1]) and numbers[0] != numbers[1]


@pytest.mark.parametrize('weights', [(1, 1), (3, 1), (0.2, 0.5)])
def test_shares_of_tokens_hold_at_every_place(weights):
    """To within a block, however long the documents of the sources are."""
    sources = [blocks([60] * 500, 64), blocks([6000] * 30, 64)]
    read = np.zeros(2)
    for count, block in enumerate(itertools.islice(Stream(sources, weights, seed=0), 5000)):
        read[block.source] += block.stop - block.start
        if count > 300:
            share = weights[0] / sum(weights)
            assert abs(read[0] - share * read.sum()) <= 64


def test_shares_of_documents():
    sources = [blocks([60] * 500, 64), blocks([6000] * 300, 64)]
    stream = Stream(sources, [1, 2], seed=0, share='documents')
    begun = collections.Counter(
        block.source for block in itertools.islice(stream, 9500) if block.start == 0
    )
    assert begun[1] == pytest.approx(2 * begun[0], abs=2) and begun[0] > 40


def test_a_number_of_epochs_ends_and_keeps_proportion():
    sources = [blocks([10] * 90, 64), blocks([10] * 30, 64)]
    drawn = list(Stream(sources, [90, 30], seed=0, epochs=2))
    assert collections.Counter(drawn).most_common(1)[0][1] == 1
    assert len(drawn) == 240
    for n in (40, 100, 200):
        assert sum(block.source == 0 for block in drawn[:n]) == pytest.approx(0.75 * n, abs=1)


def test_going_on_from_any_place():
    sources = [blocks(np.arange(1, 40), 8), blocks([100] * 3, 8)]
    stream = Stream(sources, [1, 2], seed=0)
    whole = list(itertools.islice(stream, 60))
    places = stream.beginning()
    for wanted in whole:
        block, places = stream.following(places)
        assert block == wanted


def test_too_many_blocks_are_refused(tmp_path):
    kept = tmp_path / 'blocks.npy'
    np.save(kept, np.array([0, 2**32]))
    with pytest.raises(UserError, match='divide it into several sources'):
        blocks([5], 8, cache=kept)


def test_uniform_numbers():
    drawn = np.array([order.uniform(7, i) for i in range(4000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.abs(np.histogram(drawn, 8, (0, 1))[0] - 500).max() < 90
    assert order.uniform(1, 2) != order.uniform(2, 1)

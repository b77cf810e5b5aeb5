import collections
import dataclasses

import numpy as np
import pytest

from llama_jax.data.plan import Cursor
from llama_jax.errors import UserError
from tests.data.lengths import Lengths, fill, planned, rows, units
from tests.data.objective import Causal, Few, Noisy, Nothing, Streams

RNG = np.random.default_rng(0)
SHAPES = {
    'varied': np.clip(RNG.lognormal(3.5, 1.2, 900).astype(int), 1, None),
    'short': RNG.integers(1, 12, 4000),
    'long': np.full(12, 3000),
    'most of a row': np.full(700, 38),
    'just over a row': np.full(400, 66),
}


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('maker', [Causal(), Noisy()], ids=['causal', 'noisy'])
def test_rows_are_full(name, maker):
    made = rows(planned([Lengths(SHAPES[name])], maker), 300)
    assert fill(made, maker, 64) >= 0.98


@pytest.mark.parametrize('name', SHAPES)
def test_two_streams_are_filled_evenly(name):
    made = rows(planned([Lengths(SHAPES[name])], Streams()), 200)
    assert fill(made, Streams(), 64).mean() >= 0.9


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('maker', [Causal(), Noisy()], ids=['causal', 'noisy'])
def test_no_text_repeats_within_an_epoch_and_none_is_left_out(name, maker):
    source = Lengths(SHAPES[name])
    made = rows(planned([source], maker), int(2.3 * source.units / 64))
    found = collections.Counter(units(made))
    assert max(found.values()) == 1
    per_epoch = collections.Counter(epoch for _, epoch, *_ in found)
    tokens = [source.length(document) for document in range(len(SHAPES[name]))]
    # What cannot be an example (a document of one token, of the noisy) is left out.
    wanted = source.units if maker.ends else sum(n for n in tokens if n > 1)
    assert per_epoch[0] == wanted
    # An epoch ends before the next begins: to within what fills a row.
    epochs = [min(placed.block.epoch for placed in row) for row, _ in made]
    assert epochs == sorted(epochs)


def test_short_documents_stay_whole_where_they_can():
    made = rows(planned([Lengths(SHAPES['varied'])], Causal()), 300)
    pieces = [placed.block for row, _ in made for placed in row]
    whole = Lengths(SHAPES['varied'])
    short = [b for b in pieces if whole.length(b.document) < 60]
    cut = [b for b in short if b.start or b.stop != whole.length(b.document) + 1]
    assert len(cut) < 0.1 * len(short)


def test_a_batch_comes_from_many_documents():
    """35 books: no batch of 8 rows is of one or two, and all are seen early."""
    made = rows(planned([Lengths(np.full(35, 20_000))], Causal()), 1500)
    documents = [{placed.block.document for placed in row} for row, _ in made]
    batches = [set().union(*documents[i : i + 8]) for i in range(0, 1500, 8)]
    assert np.mean([len(batch) for batch in batches]) > 6
    assert len(set().union(*documents[:1000])) == 35


@pytest.mark.parametrize('batch', range(4, 18))
def test_weights_are_shares_of_tokens_for_every_batch(batch):
    sources = [Lengths(np.full(300, 60)), Lengths(np.full(40, 6000))]
    plan = planned(sources, Causal(), batch=batch, weights=[1.0, 1.0])
    (_, cursor) = rows(plan, 1600)[-1]
    read = np.array([units for units, _ in cursor.read])
    assert read[0] / read.sum() == pytest.approx(0.5, abs=0.01)
    assert read.sum() == pytest.approx(1600 * 64, rel=0.001)


@pytest.mark.parametrize('maker', [Causal(), Noisy(), Streams(), Few()])
def test_going_on_from_every_row(maker):
    sources = [Lengths(SHAPES['varied'][:60]), Lengths([900, 5, 70])]
    plan = planned(sources, maker, seed=3)
    made = rows(plan, 400)
    assert made[-1][1].window > 1
    for done in (0, 17, 100, 257, 398):
        cursor = Cursor.loads(made[done][1].dumps())
        assert cursor == made[done][1]
        assert rows(plan, 1, cursor) == made[done + 1 : done + 2]


def test_a_cursor_stays_small():
    plan = planned([Lengths(SHAPES['short'])] * 3, Causal())
    assert max(len(cursor.dumps()) for _, cursor in rows(plan, 1200)) < 3000


def test_seeds_give_other_rows():
    orders = [
        [row for row, _ in rows(planned([Lengths(SHAPES['varied'])], Causal(), seed=seed), 20)]
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]


@pytest.mark.slow
def test_an_objective_does_not_change_the_order_of_blocks():
    """Nor where windows end, so that all arms of a comparison read the same text by then."""
    source = Lengths(SHAPES['varied'])
    places = [
        {cursor.window: cursor.places for _, cursor in rows(planned([source], maker), 500)}
        for maker in (Causal(), Noisy(), Streams())
    ]
    for other in places[1:]:
        for window in places[0].keys() & other.keys():
            assert other[window] == places[0][window]


@pytest.mark.parametrize('maker', [Causal(), Noisy(), Streams(), Few()])
def test_evaluation_reads_everything_once_and_ends(maker):
    sources = [Lengths(SHAPES['varied'][:200]), Lengths([300, 301])]
    weights = [float(source.units) for source in sources]
    made = rows(planned(sources, maker, epochs=1, weights=weights))
    found = collections.Counter(units(made))
    assert max(found.values()) == 1
    tokens = [*SHAPES['varied'][:200], 300, 301]
    assert len(found) == sum(n + 1 if maker.ends else n for n in tokens if n > 1 or maker.ends)
    # Every source in proportion from the beginning on.
    half = [placed.block for row, _ in made[: len(made) // 2] for placed in row]
    if isinstance(maker, Causal) and not isinstance(maker, Few | Streams | Noisy):
        share = sum(b.stop - b.start for b in half if b.source) / sum(
            b.stop - b.start for b in half
        )
        assert share == pytest.approx(weights[1] / sum(weights), abs=0.15)


def test_most_examples_of_a_row():
    for row, _ in rows(planned([Lengths(SHAPES['varied'])], Few()), 50):
        assert len(row) == 3 and all(placed.sizes <= (4,) for placed in row)


def test_counts_of_what_was_read():
    source = Lengths([10, 20, 100])
    made = rows(planned([source], Causal(), seq_len=16), 9)
    counted = units(made)
    ((total, documents),) = made[-1][1].read
    assert total == len(counted)
    assert documents == sum(unit == 0 for *_, unit in counted)


def test_one_short_document_fills_rows_by_epochs():
    made = rows(planned([Lengths([9])], Causal(), seq_len=32), 3)
    assert fill(made, Causal(), 32) == 1
    assert len(set(units(made))) == 96
    # Not packed anew for each of the 300 epochs that a row takes.
    made = rows(planned([Lengths([9])], Causal(), seq_len=3000), 4)
    assert made[-1][1].window <= 4 and fill(made, Causal(), 3000) == 1


def test_text_that_gives_no_example_is_refused():
    with pytest.raises(UserError, match='no document gives an example'):
        rows(planned([Lengths([5, 6])], Nothing()), 1)


def test_cursor_is_plain():
    plan = planned([Lengths([5, 600])], Causal())
    cursor = dataclasses.replace(plan.beginning(), row=3)
    assert Cursor.loads(cursor.dumps()) == cursor

import numpy as np
import pytest

from llama_jax.data import packing

LENGTHS = {'': 5, 'encoder': 4}


def example(n, m, *, start=1):
    return {
        'inputs': np.arange(start, start + n),
        'weights': np.ones(n),
        'encoder/inputs': np.arange(start, start + m),
    }


LAYOUT = packing.layout_of(example(2, 1), pad_id=9)


def test_layout_of_an_example():
    assert {
        'inputs': (np.int32, 9, ()),
        'weights': (np.float32, 0, ()),
        'encoder/inputs': (np.int32, 9, ()),
    } == LAYOUT
    assert packing.layout_of({'targets': np.zeros((1, 4), np.uint16)}, pad_id=3) == {
        'targets': (np.int32, 3, (4,))
    }


def test_empty_rows_are_padding():
    rows = packing.empty_rows(LAYOUT, rows=2, lengths=LENGTHS)
    assert rows['inputs'].tolist() == [[9] * 5] * 2
    assert rows['encoder/inputs'].tolist() == [[9] * 4] * 2
    for key in ('weights', 'segments', 'positions'):
        assert rows[key].tolist() == [[0] * 5] * 2
    assert rows['encoder/segments'].shape == rows['encoder/positions'].shape == (2, 4)


def test_examples_lie_one_after_another_in_every_stream():
    rows = packing.empty_rows(LAYOUT, rows=2, lengths=LENGTHS)
    packing.lay(rows, 1, [example(2, 1), example(2, 3, start=5)], lengths=LENGTHS)
    assert {key: row[1].tolist() for key, row in rows.items()} == {
        'inputs': [1, 2, 5, 6, 9],
        'weights': [1, 1, 1, 1, 0],
        'segments': [1, 1, 2, 2, 0],
        'positions': [0, 1, 0, 1, 0],
        'encoder/inputs': [1, 5, 6, 7],
        'encoder/segments': [1, 2, 2, 2],
        'encoder/positions': [0, 0, 1, 2],
    }
    assert not rows['segments'][0].any()


def test_examples_that_do_not_fit_or_differ_are_errors_of_the_program():
    rows = packing.empty_rows(LAYOUT, rows=1, lengths=LENGTHS)
    with pytest.raises(ValueError, match='could not broadcast'):
        packing.lay(rows, 0, [example(3, 1), example(3, 1)], lengths=LENGTHS)
    with pytest.raises(ValueError, match='different lengths'):
        packing.lay(rows, 0, [example(3, 1) | {'weights': np.ones(2)}], lengths=LENGTHS)
    with pytest.raises(ValueError, match='examples with keys'):
        packing.lay(rows, 0, [{'inputs': np.ones(2)}], lengths=LENGTHS)

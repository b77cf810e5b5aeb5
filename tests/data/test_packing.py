import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llama_jax.data import packing
from llama_jax.errors import UserError

PAD = 7
LAYOUT = packing.layout_of(
    {'inputs': np.zeros(1, np.int64), 'weights': np.zeros(1, np.float64)}, pad_id=PAD
)


def documents_of(lengths):
    """Documents as lists of examples whose tokens are numbered 100, 101, ... throughout."""
    token, documents = 100, []
    for example_lengths in lengths:
        examples = []
        for length in example_lengths:
            ids = np.arange(token, token + length, dtype=np.int32)
            examples.append({'inputs': ids, 'weights': np.ones(length, np.float32)})
            token += length
        documents.append(examples)
    return documents, token - 100


def packer(documents, *, seq_len, splittable, cursor=(0, 0)):
    return packing.Packer(
        lambda k: documents[k] if k < len(documents) else None,
        layout=LAYOUT,
        lengths={'': seq_len},
        splittable=splittable,
        patience=len(documents) + 1,
        cursor=cursor,
    )


def rows_of(pack, *, seq_len):
    rows = []
    while True:
        row = packing.empty_rows(LAYOUT, rows=1, lengths={'': seq_len})
        if not pack.fill(row, 0):
            return rows
        rows.append(({key: value[0] for key, value in row.items()}, pack.cursor))


LENGTHS = st.lists(st.lists(st.integers(0, 8), max_size=3), min_size=1, max_size=8)


@hypothesis.settings(deadline=None)
@hypothesis.given(LENGTHS, st.integers(1, 9), st.booleans())
def test_rows_hold_every_token_once_in_order(lengths, seq_len, splittable):
    if not splittable:
        seq_len = max(seq_len, 8)
    documents, total = documents_of(lengths)
    rows = rows_of(packer(documents, seq_len=seq_len, splittable=splittable), seq_len=seq_len)
    used = [row['segments'] > 0 for row, _ in rows]
    tokens = [row['inputs'][mask] for (row, _), mask in zip(rows, used, strict=True)]
    assert np.concatenate([[], *tokens]).tolist() == list(range(100, 100 + total))
    for (row, _), mask in zip(rows, used, strict=True):
        assert (row['inputs'][~mask] == PAD).all() and not row['weights'][~mask].any()
        assert not row['positions'][~mask].any() and row['weights'][mask].all()
        assert not np.diff(mask.astype(int)).any() or not mask[np.argmin(mask) :].any()
        starts = np.flatnonzero(np.diff(row['segments'], prepend=0) > 0)
        for number, start in enumerate(starts, start=1):
            inside = row['segments'] == number
            assert row['positions'][inside].tolist() == list(range(inside.sum()))
            assert np.flatnonzero(inside)[0] == start
    if splittable:
        assert all(mask.all() for mask in used[:-1])
    else:
        for row, _ in rows:
            for number in range(1, row['segments'].max() + 1):
                piece = row['inputs'][row['segments'] == number]
                assert any(
                    np.array_equal(piece, example['inputs'])
                    for examples in documents
                    for example in examples
                )


@hypothesis.settings(deadline=None)
@hypothesis.given(LENGTHS, st.integers(1, 9), st.booleans())
def test_every_cursor_resumes_with_the_same_rows(lengths, seq_len, splittable):
    if not splittable:
        seq_len = max(seq_len, 8)
    documents, _ = documents_of(lengths)
    rows = rows_of(packer(documents, seq_len=seq_len, splittable=splittable), seq_len=seq_len)
    for done, (_, cursor) in enumerate(rows, start=1):
        again = packer(documents, seq_len=seq_len, splittable=splittable, cursor=cursor)
        rest = rows_of(again, seq_len=seq_len)
        assert len(rest) == len(rows) - done
        for (row, _), (expected, _) in zip(rest, rows[done:], strict=True):
            for key, values in expected.items():
                np.testing.assert_array_equal(row[key], values)


def test_one_row_by_hand():
    documents, _ = documents_of([[3], [4]])
    (first, middle), (second, end) = rows_of(
        packer(documents, seq_len=5, splittable=True), seq_len=5
    )
    assert first['inputs'].tolist() == [100, 101, 102, 103, 104] and middle == (1, 2)
    assert first['segments'].tolist() == [1, 1, 1, 2, 2]
    assert first['positions'].tolist() == [0, 1, 2, 0, 1]
    assert second['inputs'].tolist() == [105, 106, PAD, PAD, PAD] and end == (2, 0)
    assert second['segments'].tolist() == [1, 1, 0, 0, 0]
    assert second['weights'].tolist() == [1, 1, 0, 0, 0]


def test_an_example_that_no_row_holds_is_refused():
    documents, _ = documents_of([[6]])
    row = packing.empty_rows(LAYOUT, rows=1, lengths={'': 5})
    with pytest.raises(UserError, match='example of 6 tokens does not fit in a row of 5'):
        packer(documents, seq_len=5, splittable=False).fill(row, 0)


def test_documents_without_examples_do_not_hang():
    endless = packing.Packer(
        lambda k: [], layout=LAYOUT, lengths={'': 5}, splittable=True, patience=3
    )
    row = packing.empty_rows(LAYOUT, rows=1, lengths={'': 5})
    with pytest.raises(UserError, match='3 documents in a row gave no example'):
        endless.fill(row, 0)


def test_examples_of_unequal_arrays_are_a_defect_of_the_objective():
    ragged = [{'inputs': np.zeros(2, np.int32), 'weights': np.zeros(3, np.float32)}]
    row = packing.empty_rows(LAYOUT, rows=1, lengths={'': 5})
    with pytest.raises(ValueError, match='different lengths'):
        packer([ragged], seq_len=5, splittable=True).fill(row, 0)
    with pytest.raises(ValueError, match='keys'):
        packer([[{'inputs': np.zeros(2)}]], seq_len=5, splittable=True).fill(row, 0)

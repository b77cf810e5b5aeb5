"""Deshuffling: what is shuffled, what is learnt, and who sees what."""

import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.objectives.deshuffle import Deshuffling
from tests.objectives import reading, texts

TOKENIZER = texts.tokenizer()


def example_of(text, objective=Deshuffling(), seed=0):  # noqa: B008  frozen
    rng = np.random.default_rng(seed)
    (example,) = pieces.examples(objective, text, tokenizer=TOKENIZER, seq_len=256, rng=rng)
    return example


@pytest.mark.parametrize('encoder', [False, True])
def test_inputs_are_the_tokens_in_any_order_and_targets_the_text(encoder):
    text = np.arange(100, 140)
    example = example_of(text, Deshuffling(encoder=encoder))
    n = 0 if encoder else len(text)
    shuffled = example['encoder/inputs'] if encoder else example['inputs'][:n]
    assert sorted(shuffled) == text.tolist() != shuffled.tolist()
    np.testing.assert_array_equal(example['inputs'][n:], [TOKENIZER.bos_id, *text])
    np.testing.assert_array_equal(example['targets'][n:], [*text, TOKENIZER.eos_id])
    np.testing.assert_array_equal(example['weights'], [0.0] * n + [1.0] * 41)
    other = example_of(text, Deshuffling(encoder=encoder), seed=1)
    key = 'encoder/inputs' if encoder else 'inputs'
    assert example[key].tolist() != other[key].tolist()


@pytest.mark.parametrize('encoder', [False, True])
def test_an_end_without_a_text_is_left_out(encoder):
    end = pieces.Piece(np.array([5]), 1, 2, 0.0, (0, 1), 0)
    made = Deshuffling(encoder=encoder).example(end, tokenizer=TOKENIZER, seq_len=8, rng=None)
    assert made is None


def test_every_order_is_as_likely_as_another():
    orders = [tuple(example_of(np.arange(3), seed=seed)['inputs'][:3]) for seed in range(600)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    # Chi-square of 6 orders: 20.5 is passed once in a thousand.
    assert len(counts) == 6 and np.sum((counts - 100) ** 2 / 100) < 20.5


def test_all_shuffled_tokens_are_seen_and_of_the_text_what_is_before():
    batch = reading.make_batch(Deshuffling(), seq_len=24, sizes=[4, 5])
    segment_T = batch['segments'][0]
    prefix_T = batch['prefix'][0]
    assert prefix_T.tolist() == [1] * 4 + [0] * 5 + [1] * 5 + [0] * 6 + [0] * 4
    seen = reading.same(segment_T, segment_T)
    seen &= (prefix_T > 0) | np.tri(24, dtype=bool)
    found = reading.reach(Deshuffling(), reading.DECODER, batch)
    np.testing.assert_array_equal(found[segment_T > 0], seen[segment_T > 0])


def test_a_row_without_room_and_a_model_of_the_other_kind_are_refused():
    with pytest.raises(UserError, match='2 positions has no room'):
        Deshuffling().lengths(2)
    with pytest.raises(UserError, match='encoder=True needs an encoder-decoder'):
        Deshuffling(encoder=True).check(reading.DECODER)
    with pytest.raises(UserError, match='encoder=False trains a decoder alone'):
        Deshuffling().check(reading.BOTH)
    assert Deshuffling(encoder=True).lengths(65) == {'encoder': 32, '': 33}

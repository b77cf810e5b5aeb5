"""Masked language modelling: 80/10/10, and where a token is read."""

import dataclasses

import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.masked import ordinary as drawn
from tests.objectives import reading, texts
from tests.objectives.reading import BOTH, DECODER

TOKENIZER = texts.tokenizer()
TOKENS = TOKENIZER.encode(texts.CODE[1])
FORMS = MaskedLM(), MaskedLM(read_previous=True)


def examples(objective, tokens, *, seq_len=64, seed=0):
    return pieces.examples(
        objective, tokens, tokenizer=TOKENIZER, seq_len=seq_len, rng=np.random.default_rng(seed)
    )


def parts(example, objective):
    """Shown and original tokens without begin token, and which are selected."""
    shown = example['inputs'][1:]
    read = slice(0, -1) if objective.read_previous else slice(1, None)
    return shown, example['targets'][read], example['weights'][read] > 0


@pytest.mark.parametrize('objective', FORMS)
@pytest.mark.parametrize('seq_len', [2, 16, 100, 512])
def test_examples_hold_the_document(objective, seq_len):
    found = examples(objective, TOKENS, seq_len=seq_len)
    original = []
    for example in found:
        shown, tokens, selected = parts(example, objective)
        assert example['inputs'][0] == TOKENIZER.bos_id
        assert example['weights'].sum() == selected.sum() == max(1, round(0.15 * len(tokens)))
        np.testing.assert_array_equal(shown[~selected], tokens[~selected])
        assert len(example['inputs']) <= seq_len
        assert [v.dtype for v in example.values()] == [np.int32, np.int32, np.float32]
        original.append(tokens)
    np.testing.assert_array_equal(np.concatenate(original), TOKENS)


def test_80_10_10_by_chi_square():
    counts = np.zeros(3)
    ordinary = np.flatnonzero(TOKENIZER.byte_lengths)
    random = []
    for seed in range(30):
        for example in examples(FORMS[0], TOKENS, seq_len=512, seed=seed):
            shown, tokens, selected = parts(example, FORMS[0])
            shown, tokens = shown[selected], tokens[selected]
            masked, kept = shown == TOKENIZER.mask_id, shown == tokens
            counts += [masked.sum(), (~masked & ~kept).sum(), kept.sum()]
            random.append(shown[~masked & ~kept])
    total = counts.sum()
    assert total > 20_000
    # A random token is the original by chance, once in as many as there are.
    share = 0.1 / len(ordinary)
    expected = total * np.array([0.8, 0.1 - share, 0.1 + share])
    assert np.sum((counts - expected) ** 2 / expected) < 13.8  # 99.9%, 2 degrees of freedom
    random = np.concatenate(random)
    assert np.isin(random, ordinary).all()
    assert len(np.unique(random)) > 0.9 * len(ordinary)  # not from a few


def test_random_tokens_are_uniform_over_those_of_text():
    byte_lengths = np.array([0, 3, 0, 0, 1, 2, 0, 1, 0, 0])
    ids = drawn(4000, byte_lengths=byte_lengths, rng=np.random.default_rng(0))
    counts = np.bincount(ids, minlength=10)
    assert not counts[byte_lengths == 0].any()
    assert np.sum((counts[byte_lengths > 0] - 1000) ** 2 / 1000) < 16.3  # 99.9%, 3 d.o.f.


def test_every_token_is_as_likely_to_be_selected():
    picks = np.zeros(20)
    for seed in range(4000):
        (example,) = examples(FORMS[0], TOKENS[:20], seed=seed)
        picks += parts(example, FORMS[0])[2]
    assert picks.sum() == 4000 * 3
    assert np.sum((picks - 600) ** 2 / 600) < 43.8  # 99.9%, 19 degrees of freedom


def test_mntp_reads_a_token_one_place_before():
    bert, mntp = (examples(objective, TOKENS)[3] for objective in FORMS)
    np.testing.assert_array_equal(bert['inputs'], mntp['inputs'])
    for key in ('targets', 'weights'):
        np.testing.assert_array_equal(bert[key][1:], mntp[key][:-1])
    assert bert['weights'][0] == mntp['weights'][-1] == 0


@pytest.mark.parametrize('objective', FORMS)
def test_redrawn_by_rng_alone(objective):
    one, two, three = (examples(objective, TOKENS, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(one, two, three, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
        assert (a['inputs'] != c['inputs']).any()


@pytest.mark.parametrize('objective', FORMS)
def test_short_documents(objective):
    assert examples(objective, TOKENS[:0]) == []
    (example,) = examples(objective, TOKENS[:1])
    assert example['weights'].sum() == 1 and len(example['inputs']) == 2


def test_a_rate_of_one_selects_all():
    (example,) = examples(MaskedLM(rate=1.0), TOKENS[:30])
    assert example['weights'].sum() == 30


def test_what_cannot_be_is_refused():
    for rate in (0.0, 1.5):
        with pytest.raises(UserError, match='must be in'):
            MaskedLM(rate=rate)
    with pytest.raises(UserError, match='a row of 1 positions'):
        examples(FORMS[0], TOKENS, seq_len=1)


@pytest.mark.parametrize('objective', FORMS)
def test_every_token_sees_its_own_text_and_no_other(objective):
    batch = reading.make_batch(objective, seq_len=32, sizes=[11, 14])
    segment = batch['segments'][0]
    found = reading.reach_of_all(objective, DECODER, batch)
    np.testing.assert_array_equal(found[segment > 0], reading.same(segment, segment)[segment > 0])


@pytest.mark.parametrize('objective', FORMS)
def test_what_is_under_a_mask_is_not_to_be_known(objective):
    """Two texts that differ in a masked token alone look the same."""
    tokens = TOKENS[100:120]
    (one,) = examples(objective, tokens)
    at = int(np.flatnonzero(one['inputs'][1:] == TOKENIZER.mask_id)[0])
    other = tokens.copy()
    other[at] = other[at - 1]
    assert other[at] != tokens[at]
    (two,) = examples(objective, other)
    np.testing.assert_array_equal(one['inputs'], two['inputs'])
    read = np.flatnonzero(one['targets'] != two['targets'])
    assert read.tolist() == [at if objective.read_previous else at + 1]
    assert one['weights'][read] == 1


@pytest.mark.parametrize('objective', FORMS)
def test_loss_is_over_the_selected(objective):
    batch = reading.make_batch(objective, seq_len=32, sizes=[11, 14])
    loss = reading.loss(objective, DECODER, batch)
    assert loss.weight == objective.loss_tokens(batch) == 2 + 2
    blind = dict(batch, targets=np.where(batch['weights'] > 0, batch['targets'], 5))
    assert reading.loss(objective, DECODER, blind).total == loss.total
    other = dict(batch, targets=np.where(batch['weights'] > 0, 5, batch['targets']))
    assert reading.loss(objective, DECODER, other).total != loss.total


def test_an_encoder_is_refused():
    FORMS[0].check(DECODER)
    with pytest.raises(UserError, match='set --model.encoder-layers 0'):
        FORMS[0].check(BOTH)


def test_flops_count_every_key_and_what_is_made_of_the_selected_alone():
    head = 6 * DECODER.vocab * DECODER.dim
    # Of the last layer, whose output the head alone reads, keys and values are made of all.
    queries = 2 * DECODER.heads * DECODER.head_dim * (DECODER.dim + 64)
    last = 6 * (queries + 3 * DECODER.dim * DECODER.ffn)
    without = decoder_flops(DECODER, 64, causal=False) - head - last
    assert FORMS[0].flops(DECODER, 64) == pytest.approx(without + (head + last) * 9 / 64)
    # One layer of many is computed as the others are.
    deep = dataclasses.replace(DECODER, layers=9)
    whole = decoder_flops(deep, 64, causal=False) - head
    assert FORMS[0].flops(deep, 64) == pytest.approx(whole + head * 9 / 64)

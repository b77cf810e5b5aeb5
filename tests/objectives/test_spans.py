"""Span corruption against its formulas, and back to the text."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.objectives.flops import decoder_flops, encoder_decoder_flops
from llama_jax.objectives.spans import (
    SENTINELS,
    SpanCorruption,
    Spans,
    corrupt,
    reconstruct,
    segmentation,
)
from tests.objectives import reading, texts
from tests.objectives.reading import BOTH, DECODER

TOKENIZER = texts.tokenizer()
TOKENS = TOKENIZER.encode(texts.CODE[1])
FORMS = SpanCorruption(), SpanCorruption(encoder=True)


def rng(seed=0):
    return np.random.default_rng(seed)


def examples_of(objective, tokens, *, seq_len, seed=0, tokenizer=TOKENIZER):
    return pieces.examples(objective, tokens, tokenizer=tokenizer, seq_len=seq_len, rng=rng(seed))


def runs(mask):
    """Lengths of the runs of a mask, by itertools."""
    return [len([*group]) for value, group in itertools.groupby(mask.tolist()) if value]


def parts(example):
    """Inputs and targets of an example of either form."""
    if 'encoder/inputs' in example:
        return example['encoder/inputs'], example['targets']
    n = int(example['prefix'].sum())
    return example['inputs'][:n], example['targets'][n:]


@pytest.mark.parametrize('length', [2, 3, 7, 20, 64, 113, 512])
@pytest.mark.parametrize('density', [0.1, 0.15, 0.3, 0.5])
@pytest.mark.parametrize('mean_span', [1.0, 3.0, 8.0, 64.0])
def test_counts_are_those_of_the_formula(length, density, mean_span):
    noise = int(np.clip(np.round(length * density), 1, length - 1))
    spans = int(max(np.round(noise / mean_span), 1))
    for seed in range(5):
        mask = Spans(density, mean_span).mask(length, rng(seed))
        assert mask.shape == (length,)
        assert mask.sum() == noise
        assert len(runs(mask)) == min(spans, length - noise)
        assert not mask[0] and mask[-1]
    if spans > len(TOKENIZER.sentinel_ids):
        return
    inputs, targets = corrupt(np.arange(length) % 99 + 5, mask, tokenizer=TOKENIZER)
    assert (len(inputs), len(targets)) == Spans(density, mean_span).sizes(length)
    assert len(inputs) + len(targets) == length + 2 * len(runs(mask)) + 1


@pytest.mark.parametrize('density', [0.15, 0.5])
@pytest.mark.parametrize('mean_span', [3.0, 8.0])
def test_mean_density_and_mean_span(density, mean_span):
    masks = [Spans(density, mean_span).mask(length, rng(length)) for length in range(100, 600)]
    assert np.mean([mask.mean() for mask in masks]) == pytest.approx(density, abs=0.01)
    spans = [n for mask in masks for n in runs(mask)]
    assert np.mean(spans) == pytest.approx(mean_span, rel=0.05)


def test_every_place_but_the_ends_is_as_likely_to_be_noise():
    """Of the middle of a long text: the ends have kept text, or noise, by construction."""
    masks = np.array([Spans(0.3, 3.0).mask(200, rng(seed)) for seed in range(4000)])
    middle = masks[:, 20:-20].mean(0)
    # 4000 draws of .3: a standard deviation of .0072 each; 5 of them, for 160 places are looked at.
    np.testing.assert_allclose(middle, 0.3, atol=0.036)


def test_every_way_to_cut_is_as_likely():
    counts = {}
    for seed in range(6000):
        sizes = tuple(segmentation(5, 3, rng(seed)).tolist())
        assert sum(sizes) == 5 and min(sizes) >= 1
        counts[sizes] = counts.get(sizes, 0) + 1
    assert len(counts) == 6  # 4 places, 2 cuts
    chi_square = sum((n - 1000) ** 2 / 1000 for n in counts.values())
    assert chi_square < 20.5  # 99.9% quantile at 5 degrees of freedom


def test_the_example_of_the_paper():
    """Raffel et al. 2020, figure 2."""
    words = ['Thank', 'you', 'for', 'inviting', 'me', 'to', 'your', 'party', 'last', 'week']
    tokens = np.arange(10) + 300
    mask = np.isin(words, ['for', 'inviting', 'last'])
    inputs, targets = corrupt(tokens, mask, tokenizer=TOKENIZER)
    x, y = TOKENIZER.sentinel_ids[:2]
    assert inputs.tolist() == [300, 301, x, 304, 305, 306, 307, y, 309]
    assert targets.tolist() == [x, 302, 303, y, 308, TOKENIZER.eos_id]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 398), st.booleans()), max_size=200))
def test_reconstruct_gives_the_text_for_any_mask(pairs):
    ordinary = np.flatnonzero(TOKENIZER.byte_lengths)
    tokens = ordinary[[token % len(ordinary) for token, _ in pairs]] if pairs else np.zeros(0, int)
    mask = np.array([masked for _, masked in pairs], bool)
    inputs, targets = corrupt(tokens, mask, tokenizer=TOKENIZER)
    np.testing.assert_array_equal(reconstruct(inputs, targets, tokenizer=TOKENIZER), tokens)
    sentinels = list(TOKENIZER.sentinel_ids[: len(runs(mask))])
    assert [t for t in inputs if t in TOKENIZER.sentinel_ids] == sentinels
    assert [t for t in targets if t in TOKENIZER.sentinel_ids] == sentinels
    assert sentinels == sorted(set(sentinels), reverse=True)
    assert targets[-1] == TOKENIZER.eos_id


@pytest.mark.parametrize('name', texts.NAMES)
@pytest.mark.parametrize('objective', FORMS)
@pytest.mark.parametrize('seq_len', [24, 100, 512, 8192])
def test_the_examples_of_a_document_give_it_back_and_fit(name, objective, seq_len):
    tokenizer = texts.tokenizer(name)
    tokens = tokenizer.encode(texts.CODE[1] + texts.MIXED)
    examples = examples_of(objective, tokens, seq_len=seq_len, tokenizer=tokenizer)
    found = [reconstruct(*parts(example), tokenizer=tokenizer) for example in examples]
    np.testing.assert_array_equal(np.concatenate(found), tokens)
    lengths = objective.lengths(seq_len)
    assert sum(lengths.values()) == seq_len
    for example in examples:
        inputs, targets = parts(example)
        assert targets[-1] == tokenizer.eos_id
        assert [t for t in inputs if t in tokenizer.sentinel_ids] == [
            t for t in targets if t in tokenizer.sentinel_ids
        ]
        for key, values in example.items():
            assert len(values) <= lengths[key.rpartition('/')[0]]
            assert values.dtype == (np.float32 if key == 'weights' else np.int32)


@pytest.mark.parametrize('objective', FORMS)
@pytest.mark.parametrize('seq_len', [24, 57, 512])
def test_the_longest_text_that_fits_is_taken(objective, seq_len):
    example = examples_of(objective, TOKENS, seq_len=seq_len)[0]
    longest = len(reconstruct(*parts(example), tokenizer=TOKENIZER))

    def total(n):
        noise = max(round(0.15 * n), 1)
        return n + 2 * max(round(noise / 3), 1) + 1

    assert total(longest) <= seq_len < total(longest + 1)


@pytest.mark.parametrize(('density', 'mean_span'), [(0.15, 3.0), (0.5, 8.0), (0.5, 1.0)])
def test_sizes_are_those_of_the_examples(density, mean_span):
    one, two = (
        SpanCorruption(density=density, mean_span=mean_span, encoder=encoder)
        for encoder in (False, True)
    )
    for n in (2, 3, 50, 255, 256, 257, 300):
        sizes, both = (form.sizes(n, seq_len=4096, draw=0.5) for form in (one, two))
        _, spans = Spans(density, mean_span).counts(n)
        if spans > 128:
            assert sizes is both is None
            continue
        assert sizes == (n + 2 * spans + 1,) == (sum(both),)
        for form in (one, two):
            (example,) = examples_of(form, TOKENS[:n], seq_len=4096)
            assert form.sizes(n, seq_len=4096, draw=0.5) == tuple(
                len(example[key]) for key in ('encoder/inputs', 'inputs') if key in example
            )
    assert one.sizes(1, seq_len=4096, draw=0.5) is None


def test_both_forms_say_the_same():
    seq_len = 64
    decoder, encoder = (examples_of(form, TOKENS, seq_len=seq_len) for form in FORMS)
    assert len(decoder) == len(encoder) > 10
    for one, two in zip(decoder, encoder, strict=True):
        n = len(two['encoder/inputs'])
        both = np.concatenate([two['encoder/inputs'], two['inputs']])
        np.testing.assert_array_equal(one['inputs'], both)
        np.testing.assert_array_equal(one['prefix'], np.arange(len(both)) < n)
        np.testing.assert_array_equal(one['weights'], np.arange(len(both)) >= n)
        np.testing.assert_array_equal(one['targets'][n:], two['targets'])
        assert two['inputs'][0] == TOKENIZER.bos_id
        np.testing.assert_array_equal(two['inputs'][1:], two['targets'][:-1])
        assert two['weights'].all()


def test_more_spans_than_sentinels():
    assert len(TOKENIZER.sentinel_ids) == SENTINELS
    mask = np.arange(260) % 2 == 1
    with pytest.raises(UserError, match='130 spans in 260 tokens, and 128 sentinels'):
        corrupt(np.arange(260), mask, tokenizer=TOKENIZER)
    corrupt(np.arange(256), mask[:256], tokenizer=TOKENIZER)
    # A long row holds several texts instead.
    examples = examples_of(SpanCorruption(density=0.5, mean_span=1.0), TOKENS[:1000], seq_len=4096)
    assert len(examples) == 4  # of at most 256 tokens with 128 spans


@pytest.mark.parametrize('objective', FORMS)
def test_chance_is_that_of_rng_alone(objective):
    def make(seed):
        return examples_of(objective, TOKENS, seq_len=100, seed=seed)

    for one, two in zip(make(3), make(3), strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])
    assert [e['inputs'].tolist() for e in make(3)] != [e['inputs'].tolist() for e in make(4)]


@pytest.mark.parametrize('objective', FORMS)
def test_short_documents(objective):
    def make(n):
        return examples_of(objective, TOKENS[:n], seq_len=24)

    assert make(0) == make(1) == []
    (example,) = make(2)
    inputs, targets = parts(example)
    sentinel = TOKENIZER.sentinel_ids[0]
    assert inputs.tolist() == [TOKENS[0], sentinel]
    assert targets.tolist() == [sentinel, TOKENS[1], TOKENIZER.eos_id]


def test_what_cannot_be_is_refused():
    for fields in ({'density': 0.0}, {'density': 1.0}, {'mean_span': 0.5}):
        with pytest.raises(UserError):
            dataclasses.replace(SpanCorruption(), **fields)
    for objective in FORMS:
        with pytest.raises(UserError, match='a row of 4 positions has no room'):
            examples_of(objective, TOKENS, seq_len=4)


@pytest.mark.slow
def test_who_sees_whom_on_a_decoder():
    objective = FORMS[0]
    batch = reading.make_batch(objective, seq_len=48, sizes=[14, 18])
    segment, prefix = batch['segments'][0], batch['prefix'][0] > 0
    place = np.arange(48)
    seen = reading.same(segment, segment) & ((place[:, None] >= place) | prefix)
    found = reading.reach_of_all(objective, DECODER, batch)
    np.testing.assert_array_equal(found[segment > 0], seen[segment > 0])
    # The inputs see no target, and no target sees itself or what comes after.
    assert not found[np.ix_(prefix, ~prefix)].any()


@pytest.mark.slow
def test_who_sees_whom_with_an_encoder():
    objective = FORMS[1]
    batch = reading.make_batch(objective, seq_len=56, sizes=[14, 18])
    segment, read = batch['segments'][0], batch['encoder/segments'][0]
    n = len(segment)
    found = reading.reach(objective, BOTH, batch)
    seen = reading.same(segment, segment) & np.tri(n, dtype=bool)
    np.testing.assert_array_equal(found[segment > 0], seen[segment > 0])
    found = reading.reach(objective, BOTH, batch, stream='encoder')
    np.testing.assert_array_equal(found[segment > 0], reading.same(segment, read)[segment > 0])


@pytest.mark.parametrize('objective', FORMS)
def test_what_is_under_a_sentinel_is_not_to_be_known(objective):
    """Two texts that differ in a masked token alone look the same until it is written."""
    tokens = TOKENS[100:114]
    at = int(np.flatnonzero(objective._spans().mask(14, rng()))[0])
    other = tokens.copy()
    other[at] = (other[at] - 3 + 50) % 400 + 3
    (one,), (two,) = (examples_of(objective, text, seq_len=48) for text in (tokens, other))
    differ = {key for key in one if (one[key] != two[key]).any()}
    assert differ == {'inputs', 'targets'}
    target = int(np.flatnonzero(one['targets'] != two['targets'])[0])
    assert one['weights'][target] == 1
    np.testing.assert_array_equal(one['inputs'][: target + 1], two['inputs'][: target + 1])


def test_architectures():
    FORMS[0].check(DECODER)
    FORMS[1].check(BOTH)
    with pytest.raises(UserError, match='set --model.encoder-layers 0'):
        FORMS[0].check(BOTH)
    with pytest.raises(UserError, match='set --model.encoder-layers above 0'):
        FORMS[1].check(DECODER)


def test_flops_are_those_of_the_longest_text():
    """A row of 513: 466 tokens, of which 70 are noise in 23 spans."""
    noise, spans = 70, 23
    inputs = 466 - noise + spans
    assert 466 + 2 * spans + 1 == 513
    assert FORMS[1].lengths(513) == {'encoder': inputs, '': 513 - inputs}
    assert FORMS[1].flops(BOTH, 513) == encoder_decoder_flops(BOTH, inputs, 513 - inputs)
    pairs = sum(max(inputs, t + 1) - (t + 1) for t in range(513))
    assert FORMS[0].flops(DECODER, 513) == pytest.approx(
        decoder_flops(DECODER, 513, causal=True)
        + 6 * DECODER.layers * 2 * DECODER.heads * DECODER.head_dim * pairs / 513
        # Where nothing is predicted there is no head, and of the last layer keys and values alone.
        - 6 * (DECODER.vocab + 3 * DECODER.ffn) * DECODER.dim * inputs / 513
        - 6 * 2 * DECODER.heads * DECODER.head_dim * (DECODER.dim + inputs) * inputs / 513
    )

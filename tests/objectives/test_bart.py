"""BART: what is masked, sentences in two scripts, and the original as the target."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.objectives.bart import (
    SENTENCE_END,
    Bart,
    granted,
    infilled,
    masked_tokens,
    permuted,
    sentence_ends,
    span_lengths,
)
from llama_jax.objectives.flops import encoder_decoder_flops
from tests.objectives import reading, texts
from tests.objectives.reading import BOTH, DECODER

TOKENIZER = texts.tokenizer()
TOKENS = TOKENIZER.encode(texts.CODE[1])


def rng(seed=0):
    return np.random.default_rng(seed)


def examples(objective, tokens, *, seq_len=256, seed=0, tokenizer=TOKENIZER):
    return pieces.examples(objective, tokens, tokenizer=tokenizer, seq_len=seq_len, rng=rng(seed))


def sentences(text):
    ends = [match.end() for match in SENTENCE_END.finditer(text.encode())]
    ends = [0, *ends, len(text.encode())]
    found = [text.encode()[a:b].decode() for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return [sentence for sentence in found if sentence]


@pytest.mark.parametrize(
    ('text', 'found'),
    [
        ('One. Two!  Three?\nFour', ['One.', ' Two!', '  Three?\n', 'Four']),
        ('It is 3.14 in a.b, i.e. pi; so', ['It is 3.14 in a.b, i.e.', ' pi;', ' so']),
        ('He said "No." Then (yes!) he', ['He said "No."', ' Then (yes!)', ' he']),
        ('x = 1\n\n  y = 2\n', ['x = 1\n\n', '  y = 2\n']),
        ('一統天下。後來？是！也；非', ['一統天下。', '後來？', '是！', '也；', '非']),
        ('他說：「去。」我去了……真的', ['他說：「去。」', '我去了……', '真的']),
        ('半角｡全角．Ａ', ['半角｡', '全角．', 'Ａ']),
        ('Wait... what?! End.', ['Wait...', ' what?!', ' End.']),
        ('數、列，逗：不分', ['數、列，逗：不分']),
        ('', []),
    ],
)
def test_sentences(text, found):
    assert sentences(text) == found


@pytest.mark.parametrize('name', texts.NAMES)
def test_sentences_end_at_the_token_that_ends_them(name):
    tokenizer = texts.tokenizer(name)
    tokens = tokenizer.encode(texts.MIXED)
    ends = sentence_ends(tokens, tokenizer=tokenizer)
    assert len(ends) > 10 and ends[-1] <= len(tokens)
    for end in ends:
        before = tokenizer.to_bytes(tokens[: end - 1])
        after = tokenizer.to_bytes(tokens[:end])
        ended = [m.end() for m in SENTENCE_END.finditer(tokenizer.to_bytes(tokens))]
        assert any(len(before) < e <= len(after) for e in ended)
    # Here no token belongs to two sentences, so every part is a sentence.
    parts = [tokenizer.to_bytes(part).decode() for part in np.split(tokens, ends)]
    spelled = ' ' * tokenizer.dummy_prefix + texts.MIXED
    assert [part for part in parts if part] == sentences(spelled)


def test_a_text_that_begins_inside_a_character_has_sentences_too():
    tokenizer = texts.tokenizer('bytes')
    tokens = tokenizer.encode(texts.MIXED)
    whole = sentence_ends(tokens, tokenizer=tokenizer)
    np.testing.assert_array_equal(sentence_ends(tokens[1:], tokenizer=tokenizer), whole - 1)


def test_permutation_moves_whole_sentences_uniformly():
    tokens, ends = np.arange(10), np.array([2, 3, 7])
    counts = {}
    for seed in range(4800):
        order = permuted(tokens, ends, rng(seed)).tolist()
        for sentence in ([0, 1], [2], [3, 4, 5, 6], [7, 8, 9]):
            at = order.index(sentence[0])
            assert order[at : at + len(sentence)] == sentence
        counts[tuple(order)] = counts.get(tuple(order), 0) + 1
    assert len(counts) == 24
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 49.7  # 99.9%, 23 d.o.f.


def test_lengths_are_poisson_and_sum_to_the_share():
    drawn = [span_lengths(1000, rate=0.3, mean=3.0, most=1000, rng=rng(seed)) for seed in range(50)]
    assert all(lengths.sum() == 300 for lengths in drawn)
    lengths = np.concatenate([lengths[:-1] for lengths in drawn])  # the last is cut short
    expected = np.array([np.exp(-3) * 3.0**k / np.prod(np.arange(1, k + 1)) for k in range(9)])
    counts = np.array([(lengths == k).sum() for k in range(9)])
    expected *= len(lengths)
    assert counts[0] > 100  # insertions
    assert np.sum((counts - expected) ** 2 / expected) < 26.1  # 99.9%, 8 degrees of freedom


def test_as_many_spans_as_there_is_room_for():
    for seed in range(200):
        lengths = span_lengths(10, rate=0.3, mean=3.0, most=9, rng=rng(seed))
        assert lengths.sum() == 3 and 10 - 3 + len(lengths) <= 9


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 20), st.integers(0, 99))
def test_one_mask_per_span_and_the_rest_in_order(lengths, kept, seed):
    n = sum(lengths) + kept
    inputs = infilled(np.arange(1, n + 1), np.array(lengths), mask_id=-1, rng=rng(seed))
    assert (inputs == -1).sum() == len(lengths)
    shown = inputs[inputs != -1]
    assert len(shown) == kept and (np.diff(shown) > 0).all()
    # What is missing between two kept tokens is what the masks between them stand for.
    missing = np.setdiff1d(np.arange(1, n + 1), shown)
    assert len(missing) == sum(lengths)
    places = [0, *shown.tolist(), n + 1]
    masks = [0] * (kept + 1)
    gap = 0
    for token in inputs.tolist():
        if token == -1:
            masks[gap] += 1
        else:
            gap += 1
    for gap, (a, b) in enumerate(zip(places[:-1], places[1:], strict=True)):
        assert masks[gap] or b - a == 1  # nothing is lost without a mask
        assert b - a - 1 <= sum(sorted(lengths)[len(lengths) - masks[gap] :])


def test_a_mask_without_length_is_inserted_anywhere():
    seen = set()
    for seed in range(100):
        inputs = infilled(np.array([7, 8]), np.array([0]), mask_id=-1, rng=rng(seed)).tolist()
        seen.add(tuple(inputs))
    assert seen == {(-1, 7, 8), (7, -1, 8), (7, 8, -1)}


@pytest.mark.parametrize('name', texts.NAMES)
@pytest.mark.parametrize('seq_len', [16, 64, 512])
def test_targets_are_the_document(name, seq_len):
    tokenizer = texts.tokenizer(name)
    tokens = tokenizer.encode(texts.MIXED)
    objective = Bart()
    found = examples(objective, tokens, seq_len=seq_len, tokenizer=tokenizer)
    lengths = objective.lengths(seq_len)
    assert sum(lengths.values()) == seq_len
    for example in found:
        text = example['targets'][:-1]
        assert example['targets'][-1] == tokenizer.eos_id
        assert example['inputs'][0] == tokenizer.bos_id
        np.testing.assert_array_equal(example['inputs'][1:], text)
        assert example['weights'].all()
        assert len(example['encoder/inputs']) <= lengths['encoder']
        assert len(example['inputs']) <= lengths['']
        # The encoder sees a part of the same tokens, 70% of them, in another order.
        shown = example['encoder/inputs']
        shown = shown[shown != tokenizer.mask_id]
        assert len(shown) == len(text) - max(1, round(0.3 * len(text)))
        counts = np.bincount(text, minlength=tokenizer.vocab_size)
        assert (np.bincount(shown, minlength=tokenizer.vocab_size) <= counts).all()
    np.testing.assert_array_equal(np.concatenate([e['targets'][:-1] for e in found]), tokens)
    assert any(tokenizer.mask_id in example['encoder/inputs'] for example in found)


def test_sentences_are_permuted_before_they_are_masked():
    text = ''.join(f'句{i}。' for i in '甲乙丙丁戊己庚辛壬癸' * 3)
    tokenizer = texts.tokenizer('bytes')
    tokens = tokenizer.encode(text)
    (still,) = examples(Bart(permute=False), tokens, seq_len=1024, tokenizer=tokenizer)
    (moved,) = examples(Bart(), tokens, seq_len=1024, tokenizer=tokenizer)

    def in_order(example):
        """Whether the shown tokens are a subsequence of the text."""
        rest = iter(tokens.tolist())
        shown = example['encoder/inputs']
        return all(token in rest for token in shown[shown != tokenizer.mask_id].tolist())

    assert in_order(still) and not in_order(moved)
    np.testing.assert_array_equal(still['targets'], moved['targets'])


def test_every_piece_is_permuted_by_its_own_sentences():
    """One masked token a piece leaves nearly all of its sentences whole."""
    tokenizer = texts.tokenizer('bytes')
    tokens = tokenizer.encode(texts.MIXED)
    found = examples(Bart(rate=0.001, mean_span=1.0), tokens, seq_len=640, tokenizer=tokenizer)
    assert len(found) == 3
    for example in found[:2]:  # the last is a short rest
        shown = example['encoder/inputs']
        shown = tokenizer.to_bytes(shown[shown != tokenizer.mask_id])
        text = tokenizer.to_bytes(example['targets'][:-1])
        inside = [s.encode() for s in sentences(texts.MIXED) if s.encode() in text]
        assert len(inside) >= 3
        assert sum(sentence in shown for sentence in inside) >= len(inside) - 1
        assert shown not in text  # another order


@pytest.mark.parametrize('rate', [0.001, 0.3, 0.7, 0.99])
@pytest.mark.parametrize('mean_span', [0.1, 1.0, 3.0, 20.0])
def test_inputs_that_are_granted_are_soon_drawn(rate, mean_span):
    for n in (1, 2, 3, 10, 100, 1000):
        drawn = [
            span_lengths(n, rate=rate, mean=mean_span, most=100_000, rng=rng(seed))
            for seed in range(100)
        ]
        most, kept = granted(n, rate, mean_span), n - masked_tokens(n, rate)
        assert sum(kept + len(spans) <= most for spans in drawn) > 35  # 50, less 3 deviations
    sizes = [granted(n, rate, mean_span) for n in range(1, 400)]
    assert sizes == sorted(sizes)


def test_chance_is_that_of_rng_alone():
    one, two, three = (examples(Bart(), TOKENS, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a['encoder/inputs'], b['encoder/inputs'])
    assert [e['encoder/inputs'].tolist() for e in one] != [
        e['encoder/inputs'].tolist() for e in three
    ]


def test_short_documents():
    assert examples(Bart(), TOKENS[:0]) == []
    (example,) = examples(Bart(), TOKENS[:1])
    assert example['targets'].tolist() == [TOKENS[0], TOKENIZER.eos_id]
    assert set(example['encoder/inputs']) == {TOKENIZER.mask_id}


def test_what_cannot_be_is_refused():
    for fields in ({'rate': 0.0}, {'rate': 1.0}, {'mean_span': 0.0}):
        with pytest.raises(UserError):
            Bart(**fields)
    with pytest.raises(UserError, match='a row of 4 positions has no room'):
        examples(Bart(), TOKENS, seq_len=4)


def test_who_sees_whom():
    batch = reading.make_batch(Bart(), seq_len=64, sizes=[10, 15])
    segment, read = batch['segments'][0], batch['encoder/segments'][0]
    found = reading.reach(Bart(), BOTH, batch)
    seen = reading.same(segment, segment) & np.tri(len(segment), dtype=bool)
    np.testing.assert_array_equal(found[segment > 0], seen[segment > 0])
    found = reading.reach(Bart(), BOTH, batch, stream='encoder')
    np.testing.assert_array_equal(found[segment > 0], reading.same(segment, read)[segment > 0])
    assert reading.loss(Bart(), BOTH, batch).weight == Bart().loss_tokens(batch) == 11 + 16


def test_a_decoder_alone_is_refused():
    Bart().check(BOTH)
    with pytest.raises(UserError, match='set --model.encoder-layers above 0'):
        Bart().check(DECODER)


def test_flops_are_those_of_both_streams():
    lengths = Bart().lengths(512)
    wanted = encoder_decoder_flops(BOTH, lengths['encoder'], lengths[''])
    assert Bart().flops(BOTH, 512) == wanted

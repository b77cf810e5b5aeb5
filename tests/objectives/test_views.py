"""The two views of a text that InfoNCE compares: crops and their lengths."""

import numpy as np

from llama_jax.data import pieces
from llama_jax.objectives.contrastive import InfoNCE, crop


def pairs_from(objective, text, *, seq_len, rng):
    return pieces.examples(objective, text, tokenizer=None, seq_len=seq_len, rng=rng)


def test_crops_are_parts_of_5_to_50_percent_independent_of_each_other():
    rng = np.random.default_rng(0)
    text, objective = np.arange(200), InfoNCE()
    sizes = np.array([objective.sizes(200, seq_len=256, draw=rng.random()) for _ in range(4000)])
    assert sizes.shape == (4000, 2)
    assert (sizes.min(0) == 10).all() and (sizes.max(0) == 100).all()
    for lengths in sizes.T:
        counts = np.bincount(lengths)[10:]
        # Uniform over 91 lengths: above 137 once in a thousand at 90 degrees of freedom.
        assert np.sum((counts - 4000 / 91) ** 2 / (4000 / 91)) < 137
    # The correlation of independent draws is 0 +- 1 / sqrt(4000).
    assert abs(np.corrcoef(*sizes.T)[0, 1]) < 0.06
    crops = [[crop(text, length, rng) for length in pair] for pair in sizes]
    assert [[len(x) for x in pair] for pair in crops] == sizes.tolist()
    assert all((x == np.arange(x[0], x[0] + len(x))).all() for pair in crops for x in pair)
    starts = np.array([[x[0] for x in pair] for pair in crops])
    assert starts.min() == 0 and (starts + sizes).max() == 200
    share = starts / (200 - sizes)
    assert abs(share.mean() - 0.5) < 0.02 and abs(np.corrcoef(*share.T)[0, 1]) < 0.06
    in_row = [objective.sizes(200, seq_len=60, draw=rng.random()) for _ in range(500)]
    assert np.max(in_row) == 30  # of what fits in a row
    assert objective.sizes(1, seq_len=60, draw=0.9) == (1, 1)
    assert len(crop(text[:3], 30, rng)) == 3


def test_texts_of_a_pair():
    spans, dropout = InfoNCE(), InfoNCE(views='dropout')
    assert spans.sizes(256, seq_len=512, draw=0.99) and not spans.sizes(257, seq_len=512, draw=0.0)
    assert dropout.sizes(256, seq_len=512, draw=0.1) == (256, 256)
    assert dropout.sizes(257, seq_len=2048, draw=0.1) is None  # longer than the text of a pair
    assert dropout.sizes(64, seq_len=128, draw=0.1) == (64, 64)
    assert dropout.sizes(65, seq_len=128, draw=0.1) is None


def test_tokens_of_a_crop_are_deleted_by_chance_each():
    objective, rng = InfoNCE(delete=0.25), np.random.default_rng(0)
    whole = [
        pair[f'{view}/inputs']
        for _ in range(40)
        for pair in pairs_from(objective, np.arange(256), seq_len=512, rng=rng)
        for view in 'ab'
    ]
    spans = np.array([1 + tokens[-1] - tokens[0] for tokens in whole])
    kept = np.array([len(tokens) for tokens in whole])
    assert all((np.diff(tokens) > 0).all() for tokens in whole)
    # The ends of a crop are known by what is left of it.
    assert 0.7 < (kept - 2).sum() / (spans - 2).sum() < 0.8
    (pair,) = pairs_from(InfoNCE(delete=0.999999), np.arange(256), seq_len=512, rng=rng)
    assert len(pair['a/inputs']) == len(pair['a/document']) == 1


def test_pairs_come_from_pieces_of_256_tokens_and_carry_their_document():
    objective, rng = InfoNCE(), np.random.default_rng(0)
    long, other = np.arange(600), np.arange(600) + 1
    pairs = pairs_from(objective, long, seq_len=512, rng=rng)
    assert len(pairs) == 3
    for i, pair in enumerate(pairs):
        stop = min(256 * (i + 1), 600)
        for view in 'ab':
            tokens = pair[f'{view}/inputs']
            assert tokens.dtype == np.int32
            assert 256 * i <= tokens.min() and tokens.max() < stop
            n = stop - 256 * i
            assert round(0.05 * n) <= len(tokens) <= round(0.5 * n)
        assert len(pair['a/document']) == len(pair['a/inputs'])
    again = pairs_from(objective, long, seq_len=512, rng=rng)
    different = pairs_from(objective, other, seq_len=512, rng=rng)
    (identity,) = {x for pair in [*pairs, *again] for x in pair['a/document']}
    assert identity == pieces.identity_of(long)
    assert identity >= 0 and identity not in different[0]['a/document']
    assert any(
        len(pair['a/inputs']) != len(pair['b/inputs'])
        or (pair['a/inputs'] != pair['b/inputs']).any()
        for pair in pairs
    )


def test_places_of_a_row():
    objective = InfoNCE()
    assert [objective.segments(n) for n in (8, 96, 512, 1024)] == [4, 6, 32, 64]
    # Documents of 50 tokens fill the views of a row before its places.
    rng = np.random.default_rng(0)
    mean = np.mean([objective.sizes(50, seq_len=512, draw=rng.random()) for _ in range(2000)])
    assert 256 / mean < 32

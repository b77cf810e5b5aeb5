"""Retrieval, alignment, uniformity and the probe against brute force and scikit-learn."""

import math

import numpy as np
import pytest

from llama_jax.evaluate import retrieval
from llama_jax.evaluate.probe import Part, probe


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    a_ND = rng.normal(size=(40, 6))
    return a_ND, a_ND + 1.2 * rng.normal(size=(40, 6)), np.repeat(np.arange(20), 2)


def cosine(x, y):
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def test_recall_equals_brute_force(pairs):
    a, b, document = pairs
    ranks = []
    for i in range(40):
        others = [j for j in range(40) if document[j] != document[i]]
        ranks.append(sum(cosine(a[i], b[j]) >= cosine(a[i], b[i]) for j in others))
    assert retrieval.ranks(a, b, document).tolist() == ranks
    assert 0.1 < np.mean(np.array(ranks) < 1) < np.mean(np.array(ranks) < 10) < 1


def test_recall_equals_nearest_neighbours_of_scikit_learn(pairs):
    from sklearn.neighbors import NearestNeighbors

    a, b, _ = pairs
    near = NearestNeighbors(metric='cosine').fit(b).kneighbors(a, n_neighbors=5)[1]
    hits = [i in row for i, row in enumerate(near)]
    rank_N = retrieval.ranks(a, b, np.arange(40))
    assert (rank_N < 5).tolist() == hits


def test_equal_vectors_find_nothing():
    x = np.ones((12, 3))
    assert (retrieval.ranks(x, x, np.arange(12)) == 11).all()


def test_other_pairs_of_the_document_are_no_wrong_answers():
    a = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    b = a[[1, 0, 2]]  # the first two find each other
    assert retrieval.ranks(a, b, np.array([0, 1, 2])).tolist() == [1, 1, 0]
    assert retrieval.ranks(a, b, np.array([0, 0, 2])).tolist() == [0, 0, 0]


def test_alignment_and_uniformity_equal_loops(pairs):
    a, b, _ = pairs
    a_unit, b_unit = ([x / math.sqrt(x @ x) for x in side] for side in (a, b))
    align = np.mean([sum((x - y) ** 2) for x, y in zip(a_unit, b_unit, strict=True)])
    near = [
        math.exp(-2 * sum((a_unit[i] - a_unit[j]) ** 2))
        for i in range(40)
        for j in range(40)
        if i != j
    ]
    uniform = retrieval.uniformity_result(a, seed=0)
    assert retrieval.alignment(a, b) == pytest.approx(align)
    assert uniform['value'] == pytest.approx(math.log(np.mean(near)))
    assert uniform['low'] < uniform['value'] < uniform['high']
    assert retrieval.uniformity(np.ones((5, 3))) == pytest.approx(0)
    assert retrieval.alignment(a, 7 * a) == pytest.approx(0, abs=1e-12)


def test_interval_of_uniformity_has_no_pairs_of_a_text_with_itself():
    # Opposite pairs are all at distance 2 or sqrt(2); a text with itself (distance 0) would weigh
    # e^8 times more, and lift the whole interval.
    x = np.concatenate([np.eye(20), -np.eye(20)])
    found = retrieval.uniformity_result(x, seed=0)
    assert found['low'] <= found['value'] <= found['high'] < -3.9


def test_whitening_equals_scikit_learn_and_undoes_a_common_direction():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 5)) * [9, 1, 1, 1, 1] + [20, 0, 0, 0, 0]
    white = retrieval.whitening(x)(x)
    # Of so many texts the shrinkage is small.
    np.testing.assert_allclose(np.cov(white.T), np.eye(5), atol=0.05)
    reference = PCA(whiten=True).fit_transform(retrieval.unit(x))
    gap = white @ white[:50].T - reference @ reference[:50].T
    assert np.abs(gap).mean() < 0.05
    # Few texts: no direction is scaled up without bound, and equal vectors stay together.
    few = retrieval.whitening(x[:3])(x)
    assert np.isfinite(few).all() and np.abs(few).max() < 100
    assert (retrieval.whitening(np.ones((4, 3)))(np.ones((2, 3))) == 0).all()


def test_effective_rank_counts_directions():
    x = np.concatenate([np.eye(8)[:4], -np.eye(8)[:4]])  # centred, in 4 of 8 directions
    found = retrieval.effective_rank_result(x)
    assert found['value'] == pytest.approx(4) and found['low'] <= 4 <= found['high']
    assert retrieval.effective_rank(np.ones((5, 3))) == 0
    # Vectors that differ by the rounding of float32 alone are in no direction.
    noise = 1e-7 * np.random.default_rng(0).normal(size=(256, 16))
    assert retrieval.effective_rank(np.ones((256, 16)) / 4 + noise) == 0
    p = np.array([3, 1]) / 4  # two directions, one of them weak
    of_two = np.array([[3.0, 1], [3, -1], [-3, 1], [-3, -1]])
    expected = np.exp(-(p * np.log(p)).sum())
    assert retrieval.effective_rank(of_two) == pytest.approx(expected)


def parts(x_LND, label_N):
    """Thirds for training, validation and test."""
    n = len(label_N) // 3
    return [Part(x_LND[:, i * n : (i + 1) * n], label_N[i * n : (i + 1) * n]) for i in range(3)]


def test_probe_finds_the_layer_with_the_label_and_chance_in_noise():
    rng = np.random.default_rng(0)
    label_N = rng.integers(4, size=600)
    noise_ND = rng.normal(size=(600, 8))
    told_ND = noise_ND.copy()
    told_ND[:, :4] = 5 * np.eye(4)[label_N] + 100  # needs standardising
    flat_ND = np.ones((600, 8))
    found = probe(*parts(np.stack([noise_ND, told_ND, flat_ND]), label_N))
    test_L = found.right_LN.mean(axis=1)
    assert found.right_LN.shape == (3, 200) and found.layer == found.contextual == 1
    assert test_L[1] == 1.0
    assert test_L[[0, 2]] == pytest.approx(0.25, abs=0.1)  # 3 sigma of 200 draws


def test_probe_chooses_on_validation_and_reports_on_test():
    # Layer 1 tells the label on validation only, layer 0 on all parts but noisily.
    rng = np.random.default_rng(0)
    label_N = rng.integers(2, size=600)
    told = np.stack([label_N, label_N], axis=1).astype(float)
    good = told + rng.normal(size=told.shape)
    lucky = told.copy()
    lucky[400:] = rng.normal(size=(200, 2))
    found = probe(*parts(np.stack([good, lucky]), label_N))
    test_L = found.right_LN.mean(axis=1)
    assert found.layer == 1 and test_L[1] < 0.7 < test_L[0]
    # The best of those that see other tokens, where the embedding is better still.
    found = probe(*parts(np.stack([told, good, rng.normal(size=told.shape)]), label_N))
    assert (found.layer, found.contextual) == (0, 1)
    assert found.chosen() == {'best': 0, 'contextual': 1, 'validation': found.validation_L.tolist()}


def test_probe_equals_a_pipeline_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(1)
    label_N = rng.integers(3, size=300)
    x_ND = rng.normal(size=(300, 10)) + np.eye(10)[label_N] * 2
    x_ND = x_ND * np.logspace(-3, 2, 10) + 50  # C = 1 is another penalty unless standardised
    train, validation, test = parts(x_ND[None], label_N)
    found = probe(train, validation, test).right_LN[0].mean()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    pipeline.fit(train.x_LND[0], train.label_N)
    assert found == pipeline.score(test.x_LND[0], test.label_N)
    assert 0.4 < found < 1

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
    found = retrieval.recall(np.array(ranks), seed=0)
    for k in (1, 5, 10):
        assert found[k]['value'] == np.mean([rank < k for rank in ranks])
    assert 0.1 < found[1]['value'] < found[5]['value'] < found[10]['value'] < 1


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
    aligned = retrieval.alignment_result(a, b, seed=0)
    uniform = retrieval.uniformity_result(a, seed=0)
    assert aligned['value'] == pytest.approx(align)
    assert uniform['value'] == pytest.approx(math.log(np.mean(near)))
    for found in (aligned, uniform):
        assert found['low'] < found['value'] < found['high']
    assert retrieval.uniformity(np.ones((5, 3))) == pytest.approx(0)
    assert retrieval.alignment(a, 7 * a) == pytest.approx(0, abs=1e-12)


def test_interval_of_uniformity_has_no_pairs_of_a_text_with_itself():
    # Opposite pairs are all at distance 2 or sqrt(2); a text with itself (distance 0) would weigh
    # e^8 times more, and lift the whole interval.
    x = np.concatenate([np.eye(20), -np.eye(20)])
    found = retrieval.uniformity_result(x, seed=0)
    assert found['low'] <= found['value'] <= found['high'] < -3.9


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
    found, layers = probe(*parts(np.stack([noise_ND, told_ND, flat_ND]), label_N), seed=0)
    assert found['value'] == 1.0 and layers[1] == 1.0
    assert found['n'] == 200
    assert layers[0] == pytest.approx(0.25, abs=0.1)  # 3 sigma of 200 draws
    assert layers[2] == pytest.approx(0.25, abs=0.1)


def test_probe_chooses_on_validation_and_reports_on_test():
    # Layer 1 tells the label on validation only, layer 0 on all parts but noisily.
    rng = np.random.default_rng(0)
    label_N = rng.integers(2, size=600)
    told = np.stack([label_N, label_N], axis=1).astype(float)
    good = told + rng.normal(size=told.shape)
    lucky = told.copy()
    lucky[400:] = rng.normal(size=(200, 2))
    found, layers = probe(*parts(np.stack([good, lucky]), label_N), seed=0)
    assert found['value'] == layers[1] < 0.7 < layers[0]


def test_probe_equals_a_pipeline_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(1)
    label_N = rng.integers(3, size=300)
    x_ND = rng.normal(size=(300, 10)) + np.eye(10)[label_N] * 2
    x_ND = x_ND * np.logspace(-3, 2, 10) + 50  # C = 1 is another penalty unless standardised
    train, validation, test = parts(x_ND[None], label_N)
    found, _ = probe(train, validation, test, seed=0)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    pipeline.fit(train.x_LND[0], train.label_N)
    assert found['value'] == pipeline.score(test.x_LND[0], test.label_N)
    assert 0.4 < found['value'] < 1

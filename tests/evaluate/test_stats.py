"""Statistics against hand cases, scikit-learn-free: numpy and brute force."""

import numpy as np
import pytest

from llama_jax.evaluate import stats
from llama_jax.evaluate.metrics import CURVES, METRICS


def test_mean_and_sample_deviation():
    assert stats.mean_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert stats.mean_std([4.0]) == (4.0, None)
    with pytest.raises(ValueError, match='no value'):
        stats.mean_std([])


def test_interval_of_a_mean_is_that_of_resampling():
    # The same percentiles by drawing the examples themselves, one resample at a time.
    x = np.random.default_rng(0).exponential(size=80)
    rng = np.random.default_rng(1)
    means = [x[rng.integers(80, size=80)].mean() for _ in range(20_000)]
    found = stats.of_mean(x)
    assert found['value'] == pytest.approx(x.mean())
    assert found['n'] == 80
    # A percentile of 1000 resamples is known to about a tenth of the standard error.
    error = x.std() / 80**0.5
    assert found['low'] == pytest.approx(np.quantile(means, 0.025), abs=0.25 * error)
    assert found['high'] == pytest.approx(np.quantile(means, 0.975), abs=0.25 * error)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        found = stats.of_mean(rng.normal(3.0, 2.0, size=50), seed=seed)
        covered.append(found['low'] <= 3.0 <= found['high'])
    # 95% less what a percentile interval of 50 examples lacks; 0.905 to 0.985 is 3 sigma of 200.
    assert 0.895 <= np.mean(covered) <= 0.985


def test_interval_of_a_ratio_resamples_both_together():
    bytes_ = np.array([1.0, 100.0, 3.0, 50.0])
    found = stats.of_ratio(2 * bytes_, bytes_)
    assert (found['value'], found['low'], found['high']) == (2.0, 2.0, 2.0)
    assert stats.of_ratio([1.0, 3.0], [2.0, 2.0])['value'] == 1.0


def test_interval_is_the_same_for_a_seed():
    x = np.arange(10.0)
    assert stats.of_mean(x, seed=3) == stats.of_mean(x, seed=3)
    assert stats.of_mean(x, seed=3) != stats.of_mean(x, seed=4)


def test_bold_by_hand():
    # Pooled sigma: sqrt((0.01^2 + 0.03^2 + 0.02^2) / 3) = 0.0216; two of them are 0.0432.
    means, sigmas = [0.50, 0.46, 0.45, None], [0.01, 0.03, 0.02, None]
    assert stats.bold(means, sigmas, higher_is_better=True) == [True, True, False, False]
    assert stats.bold(means, sigmas, higher_is_better=False) == [False, True, True, False]
    one_seed = stats.bold([0.5, 0.5, 0.499], [None] * 3, higher_is_better=True)
    assert one_seed == [True, True, False]
    assert stats.bold([None, None], [None, None], higher_is_better=True) == [False, False]


def test_win_matrix_by_hand():
    arms = [
        {'up': 0.9, 'down': 1.0, 'even': 1.0},
        {'up': 0.5, 'down': 2.0, 'even': 1.0},
        {'up': 0.7, 'down': None},
        {'down': None},
    ]
    better = {'up': True, 'down': False, 'even': True}
    wins = stats.win_matrix(arms, better)
    assert wins[0] == [None, pytest.approx(2.5 / 3), 1.0, None]
    assert wins[1] == [pytest.approx(0.5 / 3), None, 0.0, None]
    assert wins[2] == [0.0, 1.0, None, None]
    assert wins[3] == [None] * 4


def test_the_table_of_metrics():
    assert [name for name, metric in METRICS.items() if metric.headline] == [
        *('probe_accuracy', 'finetune_accuracy', 'recall_doc_1', 'recall_doc_5', 'recall_doc_10'),
        *('recall_span_1', 'recall_span_5', 'recall_span_10', 'alignment', 'uniformity'),
    ]
    assert set(CURVES) <= set(METRICS)
    assert all(metric.higher_is_better == (metric.unit == 'share') for metric in METRICS.values())

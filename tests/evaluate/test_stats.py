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


def test_win_matrix_by_hand():
    arms = [
        {'up': 0.9, 'up too': 0.1, 'down': 1.0, 'even': 1.0},
        {'up': 0.5, 'up too': 0.2, 'down': 2.0, 'even': 1.0},
        {'up': 0.7, 'down': None},
        {'down': None},
    ]
    tasks = {'one': {'up': True, 'up too': True}, 'two': {'down': False}, 'three': {'even': True}}
    wins = stats.win_matrix(arms, tasks)
    # Two metrics of one task have one vote together.
    assert wins[0] == [None, pytest.approx((0.5 + 1 + 0.5) / 3), 1.0, None]
    assert wins[1] == [pytest.approx((0.5 + 0 + 0.5) / 3), None, 0.0, None]
    assert wins[2] == [0.0, 1.0, None, None]
    assert wins[3] == [None] * 4


def test_the_table_of_metrics():
    common = {name for name, metric in METRICS.items() if metric.headline}
    recalls = {
        f'recall_{kind}_{k}'
        for kind in ('doc', 'span', 'doc_white', 'span_white')
        for k in (1, 5, 10)
    }
    # Geometry is told and ranks nothing.
    geometry = {name for name in common if not METRICS[name].task}
    assert geometry == {'alignment', 'uniformity', 'effective_rank'}
    assert common - geometry == {'probe_accuracy', 'finetune_accuracy'} | recalls
    assert set(CURVES) <= set(METRICS)
    # Shares are of what is right, but for an error; of bits and distances fewer are better.
    down = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    bits = {name for name, metric in METRICS.items() if metric.unit == 'bits per byte'}
    assert down == bits | {'alignment', 'uniformity', 'calibration_error'}


def test_standard_error_of_items_and_shot_seeds():
    """Against the variance of the mean over many draws of a crossed design: items and seeds have
    effects of their own, and one draw has S of the one and N of the other."""
    rng = np.random.default_rng(0)
    S, N, item, seed, rest = 4, 40, 0.5, 0.3, 2.0
    means, squares = [], []
    for _ in range(3000):
        x_SN = rng.normal(0, item, N) + rng.normal(0, seed, (S, 1)) + rng.normal(0, rest, (S, N))
        means.append(x_SN.mean())
        squares.append(stats.standard_error(x_SN) ** 2)
    truth = item**2 / N + seed**2 / S + rest**2 / (S * N)
    assert np.var(means) == pytest.approx(truth, rel=0.1)
    assert np.mean(squares) == pytest.approx(truth, rel=0.1)


def test_standard_error_of_one_seed_is_that_of_a_mean():
    x = np.random.default_rng(0).normal(size=30)
    found = stats.of_runs(x)
    assert found['se'] == pytest.approx(x.std(ddof=1) / 30**0.5)
    # A percentile interval of the same: 1.96 standard errors to each side, as far as 30 items go.
    assert found['high'] - found['low'] == pytest.approx(3.92 * found['se'], rel=0.15)
    assert stats.of_runs(np.ones((3, 1)))['se'] == 0.0


def test_interval_over_seeds_is_wider_than_over_items_alone():
    rng = np.random.default_rng(0)
    x_SN = rng.normal(size=(3, 1)) + 0.01 * rng.normal(size=(3, 50))
    found, of_items = stats.of_runs(x_SN), stats.of_runs(x_SN.mean(axis=0))
    assert found['high'] - found['low'] > 10 * (of_items['high'] - of_items['low'])
    assert found['low'] <= x_SN.mean(axis=1).min() + 0.1


@pytest.mark.parametrize('seeds', [2, 3, 5])
def test_interval_over_few_shot_seeds_holds_the_truth_as_often_as_it_says(seeds):
    """Right and wrong answers whose share differs by the shots."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        p_S1 = 0.5 + 0.1 * rng.normal(size=(seeds, 1))
        found = stats.of_runs((rng.random((seeds, 100)) < p_S1).astype(float))
        held += found['low'] <= 0.5 <= found['high']
        assert 0 <= found['low'] <= found['value'] <= found['high'] <= 1
    assert held / 400 > (0.87 if seeds == 2 else 0.93)


def test_interval_over_seeds_alone_is_students_and_over_items_too():
    from scipy import stats as theirs

    seeds = np.array([0.2, 0.5, 0.35])
    found = stats.of_runs(np.tile(seeds[:, None], 2))  # items differ in nothing
    half = theirs.t.ppf(0.975, 2) * seeds.std(ddof=1) / 3**0.5
    assert found['low'] == max(found['value'] - half, 0.2) and found['high'] == 0.5
    assert stats._half_width(np.tile(seeds[:, None], 2)) == pytest.approx(half)
    # Two items that seeds do not change: one degree of freedom.
    of_two = theirs.t.ppf(0.975, 1) * np.std([1.0, 4.0], ddof=1) / 2**0.5
    assert stats._half_width(np.array([[1.0, 4.0]] * 3)) == pytest.approx(of_two)
    assert stats._half_width(np.ones((3, 1))) == stats._half_width(np.ones((3, 4))) == 0.0


def test_an_empty_text_leaves_the_interval_of_the_others():
    x_SN, under_SN = np.array([[2.0, 3, 0], [1, 4, 0]]), np.array([[1.0, 2, 0], [1, 2, 0]])
    found = stats.of_runs(x_SN, under_SN)
    assert found['value'] == pytest.approx(10 / 6)
    assert 1 <= found['low'] < found['value'] < found['high'] <= 2


def test_equal_choices_share_the_point():
    x = np.array([-1.0, -2.0, -1.0])
    assert [stats.share_of_best(x, i) for i in range(3)] == [0.5, 0, 0.5]
    assert stats.share_of_best(np.zeros(4), 0) == 0.25


def test_ratio_over_runs_and_its_error():
    rng = np.random.default_rng(0)
    under = rng.uniform(1, 100, 4000)
    over = 2 * under + rng.normal(size=4000)
    found = stats.of_runs(over[None], under[None])
    assert found['value'] == pytest.approx(over.sum() / under.sum())
    # The spread of the ratio of as many items drawn anew: that of the noise over the sum.
    assert found['se'] == pytest.approx(4000**0.5 / under.sum(), rel=0.05)


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(1, 200))
    a, b = hard + 0.1 + 0.1 * rng.normal(size=(1, 200)), hard + 0.1 * rng.normal(size=(1, 200))
    found = stats.of_difference(a, b)
    assert found['low'] < 0.1 < found['high'] and found['low'] > 0
    assert found['se'] == pytest.approx(stats.standard_error(a - b))
    assert found['better'] == pytest.approx((a > b).mean())
    assert found['worse'] == pytest.approx((a < b).mean())
    lower = stats.of_difference(a, b, None, True)
    assert (lower['better'], lower['worse']) == (found['worse'], found['better'])
    with pytest.raises(ValueError, match='same items'):
        stats.of_difference(a, b[:, :5])

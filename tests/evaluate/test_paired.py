"""What a comparison may say: against brute force, published examples, and arms that are equal."""

import itertools
import math

import numpy as np
import pytest

from llama_jax.evaluate import paired, per_text
from llama_jax.evaluate.paired import Sample
from llama_jax.evaluate.per_text import PerText


def sample(x_SN, document_N, under_N=None):
    """An arm whose run under seed s has x_SN[s] on each text."""
    n = x_SN.shape[1]
    under_N = np.ones(n) if under_N is None else under_N
    of = np.arange(n).astype(str), np.asarray(document_N).astype(str)
    texts = {s: PerText(*of, x_N, under_N) for s, x_N in enumerate(x_SN)}
    return Sample({s: x.over.sum() / x.under.sum() for s, x in texts.items()}, texts)


def drawn(rng, *, arms, seeds, documents=40, texts=4, spread=0.1, own=0.1, noise=0.5, scale=None):
    """Arms without any difference: documents and seeds that all share, and what is an arm's own."""
    document_N = np.repeat(np.arange(documents), texts)
    hard_N = rng.normal(size=documents)[document_N] + rng.normal(size=documents * texts)
    shared_S1 = rng.normal(0, spread, (seeds, 1))
    made = {}
    for i, factor in enumerate(scale or [1.0] * arms):
        mine_S1 = factor * rng.normal(0, spread, (seeds, 1))
        rest_SN = noise * rng.normal(size=(seeds, documents * texts))
        own_N = rng.normal(0, own, documents)[document_N]
        made[f'arm {i}'] = sample(hard_N + shared_S1 + mine_S1 + rest_SN + own_N, document_N)
    return made


def test_holm_by_its_published_example():
    # Wikipedia's, after Holm (1979): p = 0.01, 0.04, 0.03, 0.005 at 5%: the first and the fourth.
    corrected, levels = paired.holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(p, 'holm')
    assert levels == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])
    assert paired.holm([math.nan, 0.04])[0][1] == 0.04  # what was not tested is no hypothesis
    assert paired.holm([]) == ([], [])


def test_the_bootstrap_is_that_of_drawing_seeds_and_documents():
    """By hand, one resample at a time: a ratio, with texts of unequal length in unequal
    documents."""
    rng = np.random.default_rng(0)
    document_N = np.array([0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 5, 6, 7, 8, 8])
    under_N = rng.uniform(1, 9, 16)
    one_SN, other_SN = rng.gamma(2.0, size=(2, 4, 16)) * under_N
    other_SN += 0.2 * rng.normal(size=(4, 1)) * under_N
    values = []
    for _ in range(4000):
        seeds = rng.integers(4, size=4)
        places = np.concatenate([np.flatnonzero(document_N == d) for d in rng.integers(9, size=9)])
        under = 4 * under_N[places].sum()
        pair = [x_SN[np.ix_(seeds, places)].sum() / under for x_SN in (one_SN, other_SN)]
        values.append(pair[0] - pair[1])
    arms = [sample(x_SN, document_N, under_N) for x_SN in (one_SN, other_SN)]
    draws = paired._Draws()
    found_R = np.subtract(*[draws.values(arm, [0, 1, 2, 3]) for arm in arms])
    assert found_R.std() == pytest.approx(np.std(values), rel=0.06)
    # A percentile of 1000 resamples is known to 7% of their deviation; 3 of those.
    for q in (0.05, 0.5, 0.95):
        near = 0.2 * np.std(values)
        assert np.quantile(found_R, q) == pytest.approx(np.quantile(values, q), abs=near)


@pytest.mark.parametrize(
    'settings',
    [
        dict(seeds=2),
        dict(seeds=3, own=0.0, spread=0.2),
        dict(seeds=3, own=0.3, spread=0.0),
        dict(seeds=2, scale=[1, 1, 1, 1, 4]),  # one arm varies more than all others
    ],
    ids=['two seeds', 'seeds alone', 'texts alone', 'an unsteady arm'],
)
def test_five_equal_arms_are_told_apart_in_no_more_than_5_percent(settings):
    rng = np.random.default_rng(0)
    to_base = any_pair = 0
    for _ in range(80):
        arms = drawn(rng, arms=5, documents=20, **settings)
        first, *others = arms
        found = paired.differences(arms, [(other, first) for other in others])
        to_base += any(x.shown for x in found.values())
        found = paired.differences(arms, itertools.combinations(arms, 2))
        any_pair += any(x.shown for x in found.values())
    # 5% of 80 are 4; 9 are as many as chance brings once in a hundred times.
    assert max(to_base, any_pair) <= 9


def test_a_difference_is_found_and_its_interval_holds_the_truth():
    rng = np.random.default_rng(1)
    shown = covered = 0
    for _ in range(100):
        arms = drawn(rng, arms=4, seeds=3)
        better = arms['arm 3']
        arms['arm 3'] = sample(
            np.array([better.texts[s].over + 0.5 for s in range(3)]),
            better.texts[0].documents,
        )
        found = paired.differences(arms, [(f'arm {i}', 'arm 0') for i in (1, 2, 3)])
        one = found['arm 3', 'arm 0']
        assert one.shown == (not one.low <= 0 <= one.high)
        shown += one.shown
        covered += one.low <= 0.5 <= one.high
    assert shown >= 60 and covered >= 93


def test_what_texts_and_seeds_share_does_not_blur_a_difference():
    rng = np.random.default_rng(2)
    arms = drawn(rng, arms=2, seeds=3, noise=0.01, own=0.01, spread=0.01)
    apart = Sample(arms['arm 1'].values)
    found = paired.differences(arms, [('arm 1', 'arm 0')])['arm 1', 'arm 0']
    spread = np.std([kept.over for kept in arms['arm 0'].texts.values()])
    assert found.texts == 160 and found.half < spread / 5
    # Without results per text the seeds speak alone, of fewer degrees of freedom.
    bare = paired.differences({**arms, 'arm 1': apart}, [('arm 1', 'arm 0')])['arm 1', 'arm 0']
    assert (bare.value, bare.texts, bare.df) == (pytest.approx(found.value), 0, 2)


def test_an_arm_that_varies_more_is_judged_by_its_own_seeds():
    """By hand, without texts: pooled over the arms, or its own where that is more."""
    rows = {'base': [0, 0, 0], 'steady': [1, 1.1, 0.9], 'unsteady': [0, 3, -3]}
    arms = {name: Sample(dict(enumerate(values))) for name, values in rows.items()}
    found = paired.differences(arms, [('steady', 'base'), ('unsteady', 'base')])
    x_AS = np.array(list(rows.values()), float)
    rest_AS = x_AS - x_AS.mean(0) - x_AS.mean(1, keepdims=True) + x_AS.mean()
    pooled = 2 * (rest_AS**2).sum() / 4
    assert paired.seed_variance(arms) == (pytest.approx(pooled), 4)
    steady, unsteady = (found[name, 'base'] for name in ('steady', 'unsteady'))
    assert steady.se == pytest.approx(math.sqrt(pooled / 3)) and steady.df == pytest.approx(4)
    assert unsteady.se == pytest.approx(math.sqrt(9 / 3)) and 2 < unsteady.df < 4
    assert unsteady.p == pytest.approx(1) and unsteady.half > steady.half


def test_arms_of_unequal_seeds_are_judged_by_the_seeds_that_both_have():
    """There is nothing to pool: Student's t of the paired seeds."""
    from scipy import stats

    one, other = [0.4, 0.9, 0.7], [0.1, 0.3, 0.35, 0.2]
    arms = {'one': Sample(dict(enumerate(one))), 'other': Sample(dict(enumerate(other)))}
    assert math.isnan(paired.seed_variance(arms)[0])
    found = paired.differences(arms, [('one', 'other')])['one', 'other']
    assert (found.seeds, found.df) == (3, 2)
    assert found.p == pytest.approx(stats.ttest_rel(one, other[:3]).pvalue)


def test_a_difference_of_the_texts_alone_has_the_degrees_of_its_documents():
    base_N, more_N = np.random.default_rng(6).normal(size=(2, 12))
    document_N = np.repeat(np.arange(4), 3)
    rows = {'base': base_N, 'more': base_N + more_N}  # the same under every seed
    arms = {name: sample(np.stack([x_N] * 3), document_N) for name, x_N in rows.items()}
    found = paired.differences(arms, [('more', 'base')])['more', 'base']
    of_documents = more_N.reshape(4, 3).mean(1)
    assert found.df == pytest.approx(3)
    # The standard error of a mean of documents, known to 1000 resamples.
    assert found.se == pytest.approx(of_documents.std(ddof=1) / 4**0.5, rel=0.08)


def test_seeds_and_documents_add_up_and_none_counts_twice():
    """A difference of parts by seed and by document: the standard error by hand."""
    of_seed, of_document = np.array([-0.3, 0.1, 0.5]), np.random.default_rng(7).normal(size=6)
    base_SN = np.random.default_rng(8).normal(size=(3, 12))
    document_N = np.repeat(np.arange(6), 2)
    more_SN = base_SN + of_seed[:, None] + of_document[document_N]
    arms = {'base': sample(base_SN, document_N), 'more': sample(more_SN, document_N)}
    found = paired.differences(arms, [('more', 'base')])['more', 'base']
    seeds, documents = of_seed.var(ddof=1) / 3, of_document.var() / 6
    assert 0.5 < documents / seeds < 2  # neither hides the other
    assert found.se == pytest.approx(math.sqrt(seeds + documents), rel=0.05)
    df = (seeds + documents) ** 2 / (seeds**2 / 2 + documents**2 / 5)
    assert found.df == pytest.approx(df, rel=0.1)


def test_one_seed_says_nothing_of_others():
    arms = drawn(np.random.default_rng(3), arms=2, seeds=1)
    found = paired.differences(arms, [('arm 1', 'arm 0')])['arm 1', 'arm 0']
    assert math.isnan(found.p) and not found.shown and found.half > 0
    other = drawn(np.random.default_rng(3), arms=2, seeds=1, documents=41)['arm 0']
    found = paired.differences({'a': arms['arm 1'], 'b': other}, [('a', 'b')])['a', 'b']
    assert found.texts == 0 and math.isnan(found.half)  # measured on other texts
    assert paired.differences({'a': arms['arm 1'], 'b': Sample({7: 0.5})}, [('a', 'b')]) == {}


def test_one_document_says_nothing_of_others():
    rows = {'base': np.arange(6.0), 'more': np.arange(6.0) + 1}
    one = {name: sample(x_N[None], np.zeros(6, int)) for name, x_N in rows.items()}
    assert math.isnan(paired.differences(one, [('more', 'base')])['more', 'base'].half)
    found, _ = per_text.measured([1.0, 2, 3], ids=['a', 'b', 'c'], documents=['d'] * 3, seed=0)
    assert found == {'value': 2.0, 'low': None, 'high': None, 'n': 3}


def test_the_noise_floor_covers_zero_as_often_as_it_says():
    rng = np.random.default_rng(4)
    covered, halves = 0, []
    for _ in range(150):
        base = drawn(rng, arms=1, seeds=3, own=0.0)['arm 0']
        texts = base.texts[0]
        again_SN = np.array([kept.over for kept in base.texts.values()])
        again_SN = again_SN - again_SN.mean(1, keepdims=True) + rng.normal(0, 0.14, (3, 1))
        again_SN += texts.over.mean() + 0.5 * rng.normal(size=again_SN.shape)
        again = sample(again_SN, texts.documents)
        again = Sample(
            {1000 + s: x for s, x in again.values.items()},
            {1000 + s: x for s, x in again.texts.items()},
        )
        found = paired.noise(base, again)
        covered += found.low <= 0 <= found.high
        halves.append(found.half)
    assert covered >= 135 and min(halves) > 0
    assert paired.noise(Sample({}), Sample({0: 1.0})) is None
    # Of one seed the texts alone are known, which is no noise floor.
    one = paired.noise(
        *(Sample({s: x.values[s]}, {s: x.texts[s]}) for x, s in ((base, 0), (again, 1000)))
    )
    assert math.isnan(one.half) and math.isnan(one.p)
    assert math.isnan(paired.noise(Sample({0: 1.0}), Sample({1000: 2.0})).half)


def test_the_noise_of_two_or_three_seeds_is_that_of_unpaired_ones():
    """Without texts it is Student's test of two independent samples of equal variance."""
    from scipy import stats

    for base, again in (([1.0, 1.4], [0.7, 1.2]), ([1.0, 1.4, 0.8], [0.7, 1.2, 1.3])):
        of_again = {1000 + i: x for i, x in enumerate(again)}
        found = paired.noise(Sample(dict(enumerate(base))), Sample(of_again))
        wanted = stats.ttest_ind(again, base)
        assert (found.df, found.p) == (wanted.df, pytest.approx(wanted.pvalue))
        assert found.half == pytest.approx(stats.t.ppf(0.975, wanted.df) * found.se)
    assert paired.seed_variance({}) == (pytest.approx(math.nan, nan_ok=True), 0)


def test_seeds_that_a_difference_needs():
    """Against the power of the test itself, by simulation."""
    n = paired.seeds_needed(0.5, variance=0.3**2, arms=1)
    rng = np.random.default_rng(5)
    for seeds, enough in ((n, True), (n - 1, False)):
        delta = rng.normal(0.5, 0.3, size=(20_000, seeds))
        t = delta.mean(1) / delta.std(1, ddof=1) * seeds**0.5
        from scipy import stats

        power = np.mean(np.abs(t) > stats.t.ppf(0.975, seeds - 1))
        assert (power >= 0.795) == enough
    assert paired.seeds_needed(0.5, variance=0.3**2, arms=8) >= n - 1
    assert paired.seeds_needed(0.1, variance=0.3**2, arms=3) > 64  # too many to simulate
    assert paired.seeds_needed(0.05, variance=0.0, rest=1e-4) == 2  # seeds change nothing
    assert paired.seeds_needed(0.05, variance=0.0) == 2
    assert paired.seeds_needed(0.1, variance=0.3**2) > 10 * n
    assert paired.seeds_needed(0.5, variance=0.3**2, rest=0.5**2) is None


@pytest.mark.parametrize(('arms', 'difference'), [(2, 5.0), (2, 1.5), (8, 2.0)])
def test_seeds_that_a_difference_needs_among_several_arms(arms, difference):
    """Against the comparison itself, again and again: the other arms do not differ."""
    n = paired.seeds_needed(difference, variance=1.0, arms=arms)
    rng = np.random.default_rng(6)
    pairs = [(str(i), '0') for i in range(1, arms + 1)]

    def shown(seeds):
        x_AS = rng.normal(scale=0.5**0.5, size=(arms + 1, seeds))
        x_AS[1] += difference
        made = {str(i): paired.Sample(dict(enumerate(x_S))) for i, x_S in enumerate(x_AS)}
        return paired.differences(made, pairs)['1', '0'].shown

    assert np.mean([shown(n) for _ in range(900)]) > 0.76
    assert n == 2 or np.mean([shown(n - 1) for _ in range(900)]) < 0.84


def test_arms_that_differ_alike_under_every_seed_while_others_are_open():
    """No other arm says how much seeds vary, and these two do not."""
    one, other = paired.Sample(dict.fromkeys(range(3), 0.5)), paired.Sample({0: 0.25, 1: 0.25})
    found = paired.differences({'a': one, 'b': other}, [('a', 'b')])['a', 'b']
    assert (found.value, found.se, found.seeds) == (0.25, 0.0, 2)

"""Statistics of results: over seeds, over examples, and between arms (host, numpy)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from scipy import special

RESAMPLES = 1000
LEVEL = 0.95

Result = dict[str, float | int | None]


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation (n - 1); None for fewer than two values."""
    x = np.asarray(values, np.float64)
    if not x.size:
        raise ValueError('the mean of no value')
    return float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else None


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, *, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic over resampled examples, at the level of 95% (Efron 1979).

    Args:
      statistic: of the weights [R, n] of R resamples (how often each example was drawn) to [R].
        The mean of x is `lambda w: w @ x / w.sum(-1)`.
      n: number of examples.
    """
    return _interval(statistic(*_weights((n,), seed)))


def jackknife(statistic: Callable[[np.ndarray], np.ndarray], n: int, *, groups: int = 20) -> Result:
    """A statistic as `bootstrap` takes it, as a result: its value, and the interval of a jackknife
    over groups of examples. For what resampling distorts: examples that are drawn twice add no
    direction to a rank, and noise to a distance that has no sign."""
    groups = min(groups, n)
    kept = 1.0 - (np.arange(n) % groups == np.arange(groups)[:, None])
    value, without = float(statistic(np.ones((1, n)))[0]), statistic(kept)
    error = math.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum())
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
    return result(value, value - half, value + half, n)


def of_mean(x: Sequence[float] | np.ndarray, *, seed: int = 0) -> Result:
    """The mean of `x` [n] as a result: value, interval, n."""
    return of_ratio(x, np.ones(len(x)), seed=seed)


def of_ratio(
    over: Sequence[float] | np.ndarray, under: Sequence[float] | np.ndarray, *, seed: int = 0
) -> Result:
    """sum(over) / sum(under) as a result; both [n], resampled together."""
    over, under = np.asarray(over, np.float64), np.asarray(under, np.float64)
    # A resample that drew nothing but examples of no weight has no ratio.
    low, high = bootstrap(
        lambda w: (w @ over) / np.maximum(w @ under, 1e-300), len(over), seed=seed
    )
    return result(float(over.sum() / under.sum()), low, high, len(over))


def result(value: float, low: float, high: float, n: int) -> Result:
    """One metric as it stands in evaluation.json."""
    return {'value': value, 'low': low, 'high': high, 'n': n}


def win_matrix(
    arms: Sequence[Mapping[str, float | None]], tasks: Mapping[str, Mapping[str, bool]]
) -> list[list[float | None]]:
    """Row i, column j: the share of tasks that arm i wins over arm j.

    A task has one vote, however many metrics measure it (`tasks`: task to metric to whether higher
    is better): the share of its metrics in which arm i is better, a tie half. Counted are metrics
    that both arms have; None where there is none, and on the diagonal.
    """

    def vote(
        mine: Mapping[str, float | None],
        other: Mapping[str, float | None],
        metrics: Mapping[str, bool],
    ) -> list[float]:
        won = []
        for name, higher in metrics.items():
            a, b = mine.get(name), other.get(name)
            if a is not None and b is not None:
                won.append(0.5 if a == b else float((a > b) == higher))
        return [sum(won) / len(won)] if won else []

    def share(mine: Mapping[str, float | None], other: Mapping[str, float | None]) -> float | None:
        votes = [v for metrics in tasks.values() for v in vote(mine, other, metrics)]
        return sum(votes) / len(votes) if votes else None

    return [
        [None if i == j else share(a, b) for j, b in enumerate(arms)] for i, a in enumerate(arms)
    ]


def of_runs(x_SN: np.ndarray, under_SN: np.ndarray | None = None, *, seed: int = 0) -> Result:
    """The mean over items and shot seeds [S, N] as a result with its standard error 'se', or with
    `under_SN` the ratio of the sums. Every item was asked under every seed.

    The interval holds for other items and for other shots. Of one seed it resamples the items; of
    several it is that of Student's t, for two or three seeds are too few to resample, and ends
    where the values do.
    """
    x_SN = np.atleast_2d(np.asarray(x_SN, np.float64))
    under_SN = np.ones_like(x_SN) if under_SN is None else np.atleast_2d(under_SN)
    value = float(x_SN.sum() / under_SN.sum())
    # Of a ratio that of its linearisation: the mean of (x - value under) / mean(under).
    linear_SN = (x_SN - value * under_SN) / under_SN.mean()
    if len(x_SN) == 1:
        weights = _weights(x_SN.shape, seed)
        low, high = _interval(weighted(weights, x_SN) / weighted(weights, under_SN))
    else:
        half = _half_width(linear_SN)
        of_each = x_SN[under_SN > 0] / under_SN[under_SN > 0]  # an empty text has none
        low, high = max(value - half, of_each.min()), min(value + half, of_each.max())
    return {
        **result(value, float(low), float(high), x_SN.shape[1]),
        'se': standard_error(linear_SN),
    }


def of_difference(
    a_SN: np.ndarray,
    b_SN: np.ndarray,
    under_SN: np.ndarray | None = None,
    lower: bool = False,
    *,
    seed: int = 0,
) -> Result:
    """a - b on the same items under the same shots, as `of_runs` of the differences; 'better' and
    'worse' are the shares of pairs in which a is above b, and below, or where `lower` is better the
    other way round."""
    a_SN, b_SN = np.atleast_2d(a_SN), np.atleast_2d(b_SN)
    if a_SN.shape != b_SN.shape:
        raise ValueError(f'{a_SN.shape} and {b_SN.shape} are not of the same items')
    found = of_runs(a_SN - b_SN, under_SN, seed=seed)
    above, below = float((a_SN > b_SN).mean()), float((a_SN < b_SN).mean())
    better, worse = (below, above) if lower else (above, below)
    return {**found, 'better': better, 'worse': worse}


def share_of_best(x: np.ndarray, i: int) -> float:
    """1 where number i of x [n] is the largest, and 1/k where it is one of k."""
    best = x == np.max(x)
    return float(best[i] / best.sum()) if best.any() else 0.0


def standard_error(x_SN: np.ndarray) -> float:
    """Of the mean of items crossed with seeds: sqrt((MS_items + MS_seeds - MS_rest) / (S N)), the
    mean squares of the analysis of variance; of one seed s / sqrt(N). 0 of a single item."""
    if x_SN.shape[1] < 2:
        return 0.0
    items, seeds, rest = _mean_squares(x_SN)
    return math.sqrt(max(items + seeds - rest, 0.0) / x_SN.size)


def _half_width(x_SN: np.ndarray) -> float:
    """Of the interval of the mean of items crossed with two seeds or more: Student's t with the
    degrees of freedom of Satterthwaite (1946). A component of variance whose
    estimate is negative counts as 0: else the interval of few seeds is too narrow where they do not
    differ. Its coverage is 95% with three seeds and 90% with two."""
    S, N = x_SN.shape
    if N < 2:
        return 0.0
    items, seeds, rest = _mean_squares(x_SN)
    spread = items**2 / (N - 1) + seeds**2 / (S - 1) + rest**2 / ((S - 1) * (N - 1))
    if not spread:
        return 0.0
    variance = max(items + seeds - rest, items, seeds)
    df = max(variance**2 / spread, 1.0)
    return float(special.stdtrit(df, (1 + LEVEL) / 2)) * math.sqrt(variance / (S * N))


def _mean_squares(x_SN: np.ndarray) -> tuple[float, float, float]:
    """Of items, of seeds, and of the rest; of one seed the last two are 0."""
    S, N = x_SN.shape
    mean_N, mean_S, mean = x_SN.mean(axis=0), x_SN.mean(axis=1), x_SN.mean()
    items = S * ((mean_N - mean) ** 2).sum() / (N - 1)
    if S == 1:
        return float(items), 0.0, 0.0
    seeds = N * ((mean_S - mean) ** 2).sum() / (S - 1)
    rest_SN = x_SN - mean_N - mean_S[:, None] + mean
    return float(items), float(seeds), float((rest_SN**2).sum() / ((S - 1) * (N - 1)))


@functools.lru_cache(maxsize=1)
def _weights(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, ...]:
    """How often each of the n of an axis was drawn, float64 [R, n], for each axis. They are kept,
    for all metrics of the same examples take the same, and to draw them is most of the time."""
    rng = np.random.default_rng(seed)
    return tuple(drawn(n, rng) for n in shape)


def drawn(n: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n is drawn in n draws, float64 [R, n] for RESAMPLES times."""
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def weighted(weights: tuple[np.ndarray, ...], x_SN: np.ndarray) -> np.ndarray:
    """Sum of x in each resample [R], under the weights of both axes."""
    w_RS, w_RN = weights
    return np.einsum('RS,SN,RN->R', w_RS, x_SN, w_RN, optimize=True)

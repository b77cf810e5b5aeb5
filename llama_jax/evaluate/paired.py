"""Differences between arms on the same seeds and the same texts: what a comparison may say.

A metric of an arm varies with the seed it was trained under and with the texts it was measured on.
The hierarchical bootstrap resamples both (seeds crossed with documents, since every run is measured
on the same texts), and the difference of two arms under the same draws is paired. Few seeds
understate how much seeds vary: the part of the variance that is theirs is put right (S draws of S
values vary by (S - 1) / S too little), is no less than what the seeds of all arms show together,
and intervals are those of Student's t. Over several arms Holm's procedure (1979) keeps the chance
of any false claim at 5%.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import special

from llama_jax.evaluate import stats
from llama_jax.evaluate.per_text import PerText

ALPHA = 0.05
_SIMULATED = 4000
"""Comparisons, for the power of a test."""
_MANY = 64
"""Seeds."""


@dataclass(frozen=True)
class Sample:
    """A metric of one arm."""

    values: Mapping[int, float]
    """By seed."""
    texts: Mapping[int, PerText] = field(default_factory=dict)
    """By seed; where one has none, texts count as given."""


class Difference(NamedTuple):
    """An arm less another."""

    value: float
    se: float
    """Standard error; nan where it is not known: one seed, and nothing per text."""
    df: float
    """Degrees of freedom of t."""
    seeds: int
    texts: int
    p: float
    """Two-sided, that there is no difference; nan with one seed, which says nothing of others."""
    corrected: float
    """`p` by Holm's procedure over the family."""
    half: float
    """Half-width of the interval at the corrected level: it leaves 0 out where `corrected` < 5%.
    With one seed it is of other texts alone, and not corrected."""

    of_texts: float = 0.0
    """The part of the variance that is the texts': more seeds do not lessen it."""

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half

    @property
    def shown(self) -> bool:
        """Whether the corrected interval carries that there is a difference."""
        return self.corrected < ALPHA


def holm(p: Sequence[float]) -> tuple[list[float], list[float]]:
    """p values corrected by Holm's procedure, and the level at which each is tested: ALPHA over the
    number of hypotheses that are left, down to the first that stands. nan is no hypothesis."""
    order = [i for i in np.argsort(p, kind='stable') if not math.isnan(p[i])]
    corrected, levels = [math.nan] * len(p), [ALPHA] * len(p)
    highest, level = 0.0, ALPHA
    for rank, i in enumerate(order):
        left = len(order) - rank
        if highest < ALPHA:  # behind the first that stands all others are tested at its level
            level = ALPHA / left
        highest = max(highest, min(1.0, left * p[i]))
        corrected[i], levels[i] = highest, level
    return corrected, levels


def differences(
    arms: Mapping[str, Sample], pairs: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], Difference]:
    """The first arm of each pair less the second, one family of hypotheses. Pairs of which one arm
    has no value under a seed of the other are left out."""
    pooled, pooled_df = seed_variance(arms)
    draws = _Draws()
    found = {}
    for pair in pairs:
        one, other = (arms[name] for name in pair)
        seeds = sorted(one.values.keys() & other.values.keys())
        if seeds:
            found[pair] = _difference(one, other, seeds, pooled, pooled_df, draws)
    corrected, levels = holm([x.p for x in found.values()])
    return {
        pair: x._replace(corrected=c, half=_half(x, level))
        for (pair, x), c, level in zip(found.items(), corrected, levels, strict=True)
    }


def noise(base: Sample, again: Sample) -> Difference | None:
    """The A/A comparison: the base arm under other seeds, less itself. The half-width of its
    interval (95%) is the noise floor: what is smaller may be seeds and texts alone. Of one seed it
    is nan: nothing is known of others."""
    seeds = dict(zip(sorted(base.values), sorted(again.values), strict=False))
    if not seeds:
        return None
    moved = Sample(
        {seed: again.values[other] for seed, other in seeds.items()},
        {seed: again.texts[other] for seed, other in seeds.items() if other in again.texts},
    )
    x_AS = np.array([[s.values[seed] for seed in seeds] for s in (base, moved)])
    n = len(seeds)
    # The seeds are no pairs here: each arm varies by itself.
    within, df = (2 * x_AS.var(axis=1, ddof=1).mean(), 2 * (n - 1)) if n > 1 else (math.nan, 0)
    found = _difference(moved, base, list(seeds), within, df, _Draws(), own=False)
    half = _half(found, ALPHA) if n > 1 else math.nan
    return found._replace(corrected=found.p, half=half)


def seed_variance(arms: Mapping[str, Sample]) -> tuple[float, float]:
    """Variance of the difference of two arms under one seed, pooled over the arms, and its degrees
    of freedom: twice the residual of the analysis of variance of arms by seeds. (nan, 0) for a
    single seed or arm."""
    most = max((len(arm.values) for arm in arms.values()), default=0)
    whole = [arm for arm in arms.values() if len(arm.values) == most]
    seeds = sorted(whole[0].values) if whole else []
    whole = [arm for arm in whole if sorted(arm.values) == seeds]
    if len(whole) < 2 or most < 2:
        return math.nan, 0.0
    x_AS = np.array([[arm.values[seed] for seed in seeds] for arm in whole])
    rest_AS = x_AS - x_AS.mean(0) - x_AS.mean(1, keepdims=True) + x_AS.mean()
    df = (len(whole) - 1) * (most - 1)
    return 2 * float((rest_AS**2).sum()) / df, float(df)


def seeds_needed(
    difference: float, *, variance: float, rest: float = 0.0, arms: int = 1, power: float = 0.8
) -> int | None:
    """How many seeds show `difference` with the chance `power`, in the worst case of Holm's
    procedure over `arms` others than the base. None: no number does, for the texts are too few.

    Args:
      variance: of the difference of two runs under one seed.
      rest: variance of the difference that more seeds do not lessen, that of the texts.
    """
    for n in range(2, 1000):
        se = math.sqrt(variance / n + rest)
        if not se:
            return n
        # With many seeds the variance is as good as known; with few that is too much to hope for.
        if special.ndtr(abs(difference) / se - special.ndtri(1 - ALPHA / arms / 2)) < power:
            continue
        if n > _MANY or not variance or _power(difference, variance, rest, arms, n) >= power:
            return n
    return None


def _power(difference: float, variance: float, rest: float, arms: int, n: int) -> float:
    """How often the test of `_difference` shows `difference` with n seeds, by simulation."""
    rng = np.random.default_rng((arms, n))
    x_RAS = rng.normal(scale=math.sqrt(variance / 2), size=(_SIMULATED, arms + 1, n))
    left_RAS = x_RAS - x_RAS.mean(1, keepdims=True) - x_RAS.mean(2, keepdims=True)
    left_RAS += x_RAS.mean((1, 2), keepdims=True)
    pooled_R = 2 * (left_RAS**2).sum((1, 2)) / (arms * (n - 1))
    delta_RS = x_RAS[:, 0] - x_RAS[:, 1]
    seeds_R, df_R = _of_seeds(delta_RS.var(axis=1, ddof=1), pooled_R, arms * (n - 1), n)
    value_R = difference + delta_RS.mean(1) + rng.normal(scale=math.sqrt(rest), size=_SIMULATED)
    all_R = seeds_R / n + rest
    df_R *= (all_R / (seeds_R / n)) ** 2  # texts are many
    p_R = 2 * special.stdtr(df_R, -np.abs(value_R) / np.sqrt(all_R))
    return float(np.mean(p_R < ALPHA / arms))


def _of_seeds(
    mine: np.ndarray, pooled: np.ndarray, pooled_df: float, S: int
) -> tuple[np.ndarray, np.ndarray]:
    """The variance of a difference that is the seeds', and its degrees of freedom, of the variance
    in two arms and that in all. Seeds that vary more in these arms than in all: the more, the less
    the others say of them."""
    alone = np.isnan(pooled)  # other arms say nothing
    pooled = np.where(alone, 0.0, pooled)
    more = mine > pooled
    share = np.where(more, pooled / np.where(more, mine, 1.0), 1.0) ** 2 * ~alone
    return np.maximum(mine, pooled), (S - 1) + share * (pooled_df - (S - 1))


def _difference(
    one: Sample,
    other: Sample,
    seeds: list[int],
    pooled: float,
    pooled_df: float,
    draws: _Draws,
    *,
    own: bool = True,
) -> Difference:
    S = len(seeds)
    delta_S = np.array([one.values[seed] - other.values[seed] for seed in seeds])
    mine = float(delta_S.var(ddof=1)) if S > 1 else 0.0
    both = [draws.values(arm, seeds) for arm in (one, other)]
    if both[0] is not None and both[1] is not None and draws.same(one, other, seeds):
        resampled = float(np.var(both[0] - both[1]))
        documents = draws.documents(one, seeds)
        n_texts = len(one.texts[seeds[0]].over)
    else:
        resampled, documents, n_texts = mine * (S - 1) / S**2, 0, 0
    value = float(delta_S.mean())
    # To resample D documents is to divide by D, and not by D - 1.
    more = documents / (documents - 1) if documents > 1 else 1.0
    if S < 2:
        # One document says nothing of others.
        se = math.sqrt(resampled * more) if documents > 1 else math.nan
        df = float(max(documents - 1, 1))
        return Difference(value, se, df, S, n_texts, math.nan, math.nan, math.nan, resampled)
    seed_part, seed_df = pooled, pooled_df
    if own:
        found = _of_seeds(np.array(mine), np.array(pooled), pooled_df, S)
        seed_part, seed_df = (float(x) for x in found)
    rest = max(resampled - mine * (S - 1) / S**2, 0.0) * more
    parts = [(seed_part / S, seed_df), (rest, max(documents - 1, 1))]
    variance = sum(part for part, _ in parts)
    # Welch & Satterthwaite.
    spread = sum(part**2 / df for part, df in parts)
    df = variance**2 / spread if spread else seed_df
    se = math.sqrt(variance)
    p = 2 * float(special.stdtr(df, -abs(value) / se)) if se else float(value == 0)
    return Difference(value, se, df, S, n_texts, p, math.nan, math.nan, rest)


def _half(found: Difference, level: float) -> float:
    return found.se * float(special.stdtrit(found.df, 1 - level / 2))


class _Draws:
    """Bootstrap replicates of arms, all under the same draws of seeds and documents."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[int, ...]], np.ndarray | None] = {}
        self._weights: dict[tuple[int, int], np.ndarray] = {}

    def values(self, arm: Sample, seeds: list[int]) -> np.ndarray | None:
        """The metric of each resample [R]; None where a run has nothing per text."""
        key = (id(arm), tuple(seeds))
        if key not in self._kept:
            self._kept[key] = self._values(arm, seeds)
        return self._kept[key]

    def documents(self, arm: Sample, seeds: list[int]) -> int:
        return len(np.unique(arm.texts[seeds[0]].documents))

    def same(self, one: Sample, other: Sample, seeds: list[int]) -> bool:
        """Whether both were measured on the same texts."""
        first, *rest = [arm.texts[seed].ids for arm in (one, other) for seed in seeds]
        return all(np.array_equal(first, texts) for texts in rest)

    def _values(self, arm: Sample, seeds: list[int]) -> np.ndarray | None:
        if any(seed not in arm.texts for seed in seeds):
            return None
        runs = [arm.texts[seed] for seed in seeds]
        if any(not np.array_equal(run.ids, runs[0].ids) for run in runs):
            return None
        _, place_N = np.unique(runs[0].documents, return_inverse=True)
        D = int(place_N.max()) + 1
        over_SD, under_SD = (
            np.array([np.bincount(place_N, weights=x, minlength=D) for x in of])
            for of in ([run.over for run in runs], [run.under for run in runs])
        )
        weights = self._weight(len(seeds), 0), self._weight(D, 1)
        over_R, under_R = (stats.weighted(weights, x_SD) for x_SD in (over_SD, under_SD))
        return over_R / np.maximum(under_R, 1e-300)

    def _weight(self, n: int, stream: int) -> np.ndarray:
        """How often each of n was drawn [R, n]; seeds and documents by streams of their own."""
        if (n, stream) not in self._weights:
            self._weights[n, stream] = stats.drawn(n, np.random.default_rng((n, stream)))
        return self._weights[n, stream]

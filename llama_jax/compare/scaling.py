"""Scaling laws: loss as a function of parameters and tokens, fitted to the runs of grids.

L(N, D) = E + A / N^alpha + B / D^beta, by the third approach of Hoffmann et al. (2022; 2203.15556):
the sum of the Huber losses of log L, minimised from the paper's grid of starts. The paper's L-BFGS
stopped too early, as Besiroglu et al. (2024; 2404.10102) found; steps of least squares with slopes
(scipy's trust region) reach the lowest point, from many starts the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from llama_jax.errors import UserError

DELTA = 1e-3
"""Of the Huber loss of log L, as in the paper."""
_STARTS = 12
"""Of the paper's grid of starts the best are followed."""
_LEAST = 6
"""Pairs of size and tokens: one more than there are numbers to be found."""
_MOST_CORRELATED = 0.95
"""Of a ladder of equally many tokens per parameter it is 1, and alpha and beta are anything."""
_VALUES = 3
"""Of sizes, and of numbers of tokens: by two of them neither A, alpha and E nor B, beta and E can
be told apart."""
RESAMPLES = 200
LEVEL = 0.95


class Runs(NamedTuple):
    """What was trained, float64 [n] each."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    """Held out, in nats or bits."""

    def take(self, which: np.ndarray) -> Runs:
        """Some of them, by number or by mask."""
        return Runs(*(x[which] for x in self))


class Law(NamedTuple):
    E: float
    """What remains of the loss with any number of parameters and tokens."""
    log_A: float
    log_B: float
    """Where runs hardly tell an exponent, A and B themselves may be beyond any float."""
    alpha: float
    beta: float

    def __call__(self, parameters: Any, tokens: Any) -> Any:
        """Loss of a run, or of many."""
        of_size = np.exp(self.log_A - self.alpha * np.log(parameters))
        return self.E + of_size + np.exp(self.log_B - self.beta * np.log(tokens))

    def numbers(self) -> dict[str, float]:
        """E, A, B, alpha, beta."""
        with np.errstate(over='ignore'):
            A, B = (float(np.exp(x)) for x in (self.log_A, self.log_B))
        return {'E': self.E, 'A': A, 'B': B, 'alpha': self.alpha, 'beta': self.beta}

    @property
    def has_best(self) -> bool:
        """Whether the loss falls with parameters and with tokens: else no size is the best one."""
        return self.alpha > 0 and self.beta > 0

    def best(self, flops: np.ndarray | float, *, per: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
        """Parameters and tokens of the least loss at so many FLOPs = `per` N D (equation 4). Raises
        UserError for a law that has none."""
        if not self.has_best:
            raise UserError(
                f'a law of alpha {self.alpha:.3g} and beta {self.beta:.3g} has no best size: both '
                'have to be above 0'
            )
        share = 1 / (self.alpha + self.beta)
        ratio = math.log(self.alpha / self.beta) + self.log_A - self.log_B
        G = np.exp(share * ratio)
        n_d = np.asarray(flops, np.float64) / per
        return G * n_d ** (self.beta * share), n_d ** (self.alpha * share) / G


def fit(runs: Runs) -> Law:
    """The law of all runs. Raises UserError for runs that cannot tell it: too few, of a single size
    or of a single number of tokens."""
    _check(runs)
    starts = np.array(
        list(
            itertools.product(
                np.arange(0, 26, 5.0),  # log A
                np.arange(0, 26, 5.0),  # log B
                np.arange(-1, 1.5, 0.5),  # log E
                np.arange(0, 2.5, 0.5),  # alpha
                np.arange(0, 2.5, 0.5),  # beta
            )
        )
    )
    starts = _centred(starts, runs)
    return _follow(runs, starts[np.argsort(_objective(starts, runs))[:_STARTS]])


class Fitted(NamedTuple):
    """A law with the intervals of its numbers, and of what follows from them."""

    law: Law
    low: Law
    high: Law
    resampled: list[Law]

    def forecast(self, parameters: float, tokens: float) -> tuple[float, float, float]:
        """Loss of another run, and its interval: that of the law, without the noise of a run."""
        values = [law(parameters, tokens) for law in self.resampled]
        return float(self.law(parameters, tokens)), *_interval(values)


def fitted(runs: Runs, *, seed: int = 0, resamples: int = RESAMPLES) -> Fitted:
    """`fit` with the percentile intervals of a bootstrap over runs. A resample of fewer than three
    sizes or numbers of tokens, which tells no law, is drawn again."""
    law = fit(runs)
    numbers = np.array([[law.log_A, law.log_B, math.log(law.E), law.alpha, law.beta]])
    rng = np.random.default_rng(seed)
    found: list[Law] = []
    while len(found) < resamples:
        drawn = runs.take(rng.integers(len(runs.loss), size=len(runs.loss)))
        if min(len(set(drawn.parameters)), len(set(drawn.tokens))) >= _VALUES:
            found.append(_follow(drawn, _centred(numbers, drawn)))
    low, high = zip(*(_interval(values) for values in zip(*found, strict=True)), strict=True)
    return Fitted(law, Law(*low), Law(*high), found)


class Check(NamedTuple):
    """A forecast of what was measured after all."""

    measured: float
    forecast: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Of the forecast, relative."""
        return self.forecast / self.measured - 1


def leave_largest_out(runs: Runs, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Check]:
    """The runs of most FLOPs (N x D), forecast by a law that was fitted to all smaller ones."""
    cost = runs.parameters * runs.tokens
    largest = np.isclose(cost, cost.max(), rtol=0.01)
    law = fitted(runs.take(~largest), seed=seed, resamples=resamples)
    return [
        Check(float(loss), *law.forecast(float(n), float(d)))
        for n, d, loss in zip(*runs.take(largest), strict=True)
    ]


def budgets(runs: Runs, flops: np.ndarray) -> Iterator[np.ndarray]:
    """Masks [n] of the runs that share a number of FLOPs to within 5%, the least first; of those
    that have three sizes or more."""
    left = np.ones(len(flops), bool)
    while left.any():
        same = left & np.isclose(flops, flops[left].min(), rtol=0.05)
        left &= ~same
        if len(set(np.round(np.log(runs.parameters[same]), 3))) >= _VALUES:
            yield same


def iso_flops(runs: Runs, flops: np.ndarray) -> dict[float, tuple[float, float]]:
    """Of each budget of `flops` [n] that three sizes or more share to within 5%, the parameters of
    the least loss and that loss: the lowest point of the parabola over log N (approach 2). A
    parabola that opens downwards, or whose lowest point lies beyond the sizes, is left out."""
    found = {}
    for same in budgets(runs, flops):
        x, y = np.log(runs.parameters[same]), runs.loss[same]
        a, b, c = np.polyfit(x, y, 2)
        lowest = -b / (2 * a)
        if a > 0 and x.min() <= lowest <= x.max():
            found[float(flops[same].min())] = float(np.exp(lowest)), float(c - b**2 / (4 * a))
    return found


def best_by_budget(
    laws: dict[str, Law], flops: Sequence[float], *, per: dict[str, float]
) -> dict[float, str]:
    """The arm of the least loss at each budget, each at its own best size; of arms that have none,
    nothing is said, nor of a single arm. `per`: FLOPs of an arm per parameter and token."""
    arms = [arm for arm, law in laws.items() if law.has_best]

    def least(arm: str, budget: float) -> float:
        return float(laws[arm](*laws[arm].best(budget, per=per[arm])))

    return {c: min(arms, key=lambda arm: least(arm, c)) for c in flops} if len(arms) > 1 else {}


def _check(runs: Runs) -> None:
    if not all(np.isfinite(x).all() and (x > 0).all() for x in runs):
        raise UserError('a law takes numbers above 0: parameters, tokens and loss of finished runs')
    sizes, lengths = len(set(runs.parameters)), len(set(runs.tokens))
    pairs = len(set(zip(runs.parameters, runs.tokens, strict=True)))
    if pairs < _LEAST or min(sizes, lengths) < _VALUES:
        raise UserError(
            f'{len(runs.loss)} runs of {sizes} sizes and {lengths} numbers of tokens, {pairs} '
            f'pairs of both, tell no law of five numbers: give {_LEAST} pairs or more, of '
            f'{_VALUES} sizes and {_VALUES} numbers of tokens'
        )
    correlation = float(np.corrcoef(np.log(runs.parameters), np.log(runs.tokens))[0, 1])
    if correlation > _MOST_CORRELATED:
        raise UserError(
            f'tokens grow with the size (correlation of their logarithms {correlation:.3f}), so '
            'that nothing says which of both a loss is due to: train some sizes on other numbers '
            'of tokens as well'
        )


def _terms(number_S5: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """log L less that of the runs [S, R], and its slopes [5, S, R], of some centred numbers."""
    a, b, e, alpha, beta = (number_S5[:, i, None] for i in range(5))
    middle_n, middle_d = _middles(runs)
    log_n, log_d = np.log(runs.parameters) - middle_n, np.log(runs.tokens) - middle_d
    term_3SR = np.stack(np.broadcast_arrays(a - alpha * log_n, b - beta * log_d, e + 0 * log_n))
    log_SR = np.logaddexp.reduce(term_3SR)
    of_a, of_b, of_e = np.exp(term_3SR - log_SR)
    slopes = np.stack([of_a, of_b, of_e, -of_a * log_n, -of_b * log_d])
    return log_SR - np.log(runs.loss), slopes


def _objective(number_S5: np.ndarray, runs: Runs) -> np.ndarray:
    """Sum of the Huber losses of log L, of each of some centred numbers."""
    gap_SR, _ = _terms(number_S5, runs)
    small = np.abs(gap_SR) <= DELTA
    huber_SR = np.where(small, 0.5 * gap_SR**2, DELTA * (np.abs(gap_SR) - 0.5 * DELTA))
    return huber_SR.sum(axis=1)


def _follow(runs: Runs, starts: np.ndarray) -> Law:
    """The lowest point that is reached from any start."""
    ends = [
        optimize.least_squares(
            lambda x: _terms(x[None], runs)[0][0],
            start,
            jac=lambda x: _terms(x[None], runs)[1][:, 0].T,
            loss='huber',
            f_scale=DELTA,
            xtol=1e-10,
            ftol=1e-12,
            gtol=1e-12,
            max_nfev=500,
        )
        for start in starts
    ]
    a, b, e, alpha, beta = min(ends, key=lambda end: end.cost).x
    middle_n, middle_d = _middles(runs)
    log_A, log_B = a + alpha * middle_n, b + beta * middle_d
    return Law(math.exp(e), float(log_A), float(log_B), float(alpha), float(beta))


def _centred(number_S5: np.ndarray, runs: Runs) -> np.ndarray:
    """(log A, log B, log E, alpha, beta) with the two terms at the middle of the runs in place of
    log A and log B: these hardly depend on the exponents, so that few steps are to go."""
    number_S5 = number_S5.copy()
    for i, middle in enumerate(_middles(runs)):
        number_S5[:, i] -= number_S5[:, 3 + i] * middle
    return number_S5


def _middles(runs: Runs) -> tuple[float, float]:
    return float(np.log(runs.parameters).mean()), float(np.log(runs.tokens).mean())


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)

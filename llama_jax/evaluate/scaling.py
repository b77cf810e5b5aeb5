"""Scaling laws: L(N, D) = E + A / N^alpha + B / D^beta, of parameters N and training tokens D.

Approach 3 of Hoffmann et al. (2022): the Huber loss of log L, minimised by L-BFGS from a grid of
starts. As Besiroglu et al. (2024, 2404.10102) ask for, it is a sum and minimised to the end, and
intervals are of a bootstrap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from llama_jax.errors import UserError

DELTA = 1e-3
"""Of the Huber loss: residuals of log L beyond it count in proportion."""
STARTS = 24
"""Of the grid of starts those of the lowest loss are followed."""
DRAWS = 200
"""Of the bootstrap."""
LEAST = 6
"""Pairs of N and D, one more than there are parameters."""
_GRID = (
    np.arange(0.0, 26.0, 5.0),
    np.arange(0.0, 26.0, 5.0),
    np.arange(-1.0, 1.1, 0.5),
    np.arange(0.0, 2.1, 0.5),
    np.arange(0.0, 2.1, 0.5),
)
"""Of log A, log B, log E, alpha and beta: that of the paper (appendix D.3)."""


class Point(NamedTuple):
    """One run."""

    parameters: float
    tokens: float
    loss: float

    @property
    def place(self) -> tuple[float, float]:
        return self.parameters, self.tokens


class Law(NamedTuple):
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def best(self, budget: float, cost: float) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss where cost x parameters x tokens is the budget,
        such as FLOPs at a cost of 6 (equation 4 there). Infinity and 0 where more parameters would
        always help, 0 and infinity where more tokens would."""
        if self.alpha * self.A <= 0 or self.beta * self.B <= 0:
            return (0.0, math.inf) if self.alpha * self.A <= 0 else (math.inf, 0.0)
        ratio = self.alpha * self.A / (self.beta * self.B)
        log_n = (math.log(ratio) + self.beta * math.log(budget / cost)) / (self.alpha + self.beta)
        return math.exp(log_n), budget / cost / math.exp(log_n)

    def lowest(self, budget: float, cost: float) -> float:
        """The loss there."""
        parameters, tokens = self.best(budget, cost)
        return self.loss(parameters, tokens) if 0 < parameters < math.inf else math.nan


class Fit(NamedTuple):
    law: Law
    draws: list[Law]
    """Fits of resampled residuals."""
    residuals: np.ndarray
    """Of log L, at the points."""

    def interval(self, of: Callable[[Law], float]) -> tuple[float, float]:
        """Of 95%, of what follows from a law."""
        found = [of(draw) for draw in self.draws]
        low, high = np.nanpercentile(found, [2.5, 97.5])
        return float(low), float(high)


class Forecast(NamedTuple):
    """The loss of the largest runs, from all others."""

    parameters: float
    tokens: float
    predicted: float
    low: float
    high: float
    """Of one more run: how much the law is uncertain, and how much runs vary."""
    measured: float
    """Mean over seeds."""

    @property
    def held(self) -> bool:
        return self.low <= self.measured <= self.high


def fit(points: Sequence[Point], *, seed: int = 0, draws: int = DRAWS) -> Fit:
    """Raises UserError for too few points, or points on which nothing depends."""
    _check(points)
    n_P, d_P, log_loss_P = np.log(np.array(points, np.float64)).T
    # Centred, exponents and factors hardly depend on each other.
    means = n_P.mean(), d_P.mean()
    x_P, y_P = n_P - means[0], d_P - means[1]
    starts = _starts(x_P, y_P, log_loss_P, means)
    found = (_minimum(x_P, y_P, log_loss_P, start) for start in starts)
    best = min(found, key=lambda one: one.fun).x
    residuals = log_loss_P - _predicted(best[None], x_P, y_P)[0]
    rng = np.random.default_rng(seed)
    # The fit takes up a part of the spread: as many degrees of freedom as it has parameters.
    wider = residuals * math.sqrt(len(points) / max(len(points) - best.size, 1))
    wider -= wider.mean()
    laws = []
    for _ in range(draws):
        drawn_P = log_loss_P - residuals + rng.choice(wider, len(points))
        laws.append(_law(_minimum(x_P, y_P, drawn_P, best).x, means))
    return Fit(_law(best, means), laws, residuals)


def forecast(points: Sequence[Point], *, seed: int = 0) -> Forecast:
    """Leaves the runs with most parameters x tokens out, and forecasts their mean."""
    parameters, tokens = max((p.place for p in points), key=math.prod)
    rest = [p for p in points if p.place != (parameters, tokens)]
    found = fit(rest, seed=seed)
    rng = np.random.default_rng(seed)
    noise = rng.choice(found.residuals, len(found.draws))
    losses = [
        law.loss(parameters, tokens) * math.exp(e)
        for law, e in zip(found.draws, noise, strict=True)
    ]
    low, high = np.percentile(losses, [2.5, 97.5])
    measured = [p.loss for p in points if p.place == (parameters, tokens)]
    return Forecast(
        *(parameters, tokens, found.law.loss(parameters, tokens), float(low), float(high)),
        float(np.mean(measured)),
    )


def _check(points: Sequence[Point]) -> None:
    places = {p.place for p in points}
    sizes, lengths = ({place[i] for place in places} for i in (0, 1))
    if len(places) < LEAST or len(sizes) < 2 or len(lengths) < 2:
        raise UserError(
            f'{len(places)} pairs of size and tokens ({len(sizes)} sizes, {len(lengths)} lengths): '
            f'a scaling law of 5 parameters needs {LEAST} or more, of several sizes and lengths; '
            'finish more runs, or name more comparisons'
        )
    for point in points:
        if not all(0 < x < math.inf for x in point):
            raise UserError(f'{point}: parameters, tokens and loss are above 0 and finite')


def _predicted(theta_KZ: np.ndarray, x_P: np.ndarray, y_P: np.ndarray) -> np.ndarray:
    """log L [K, P] of K laws (log A, log B, log E, alpha, beta), of centred logarithms."""
    a, b, e, alpha, beta = theta_KZ.T[..., None]
    terms = np.stack([a - alpha * x_P, b - beta * y_P, e + 0 * x_P])
    return special.logsumexp(terms, axis=0)


def _starts(
    x_P: np.ndarray, y_P: np.ndarray, log_loss_P: np.ndarray, means: tuple[float, float]
) -> np.ndarray:
    grid = np.array(list(itertools.product(*_GRID)))
    grid[:, 0] -= grid[:, 3] * means[0]
    grid[:, 1] -= grid[:, 4] * means[1]
    cost = special.huber(DELTA, log_loss_P - _predicted(grid, x_P, y_P)).sum(axis=1)
    return grid[np.argsort(cost, kind='stable')[:STARTS]]


def _minimum(
    x_P: np.ndarray, y_P: np.ndarray, log_loss_P: np.ndarray, start: np.ndarray
) -> optimize.OptimizeResult:
    """By L-BFGS in coordinates in which the start is a round valley: exponents and factors pull
    together, and few steps lead down."""
    slopes_ZP = _slopes(start, x_P, y_P)[1]
    curvature = slopes_ZP @ slopes_ZP.T
    curvature += np.eye(len(start)) * 1e-6 * max(np.trace(curvature), 1e-30)
    to_theta = np.linalg.inv(np.linalg.cholesky(curvature)).T * math.sqrt(len(x_P))

    def cost(z: np.ndarray) -> tuple[float, np.ndarray]:
        predicted_P, slopes_ZP = _slopes(start + to_theta @ z, x_P, y_P)
        rest_P = predicted_P - log_loss_P
        near_P = np.clip(rest_P, -DELTA, DELTA)
        huber = float((near_P * (rest_P - near_P / 2)).sum())
        return huber / DELTA, to_theta.T @ (slopes_ZP @ near_P) / DELTA

    found = optimize.minimize(
        cost,
        np.zeros_like(start),
        jac=True,
        method='L-BFGS-B',
        options={'maxiter': 500, 'ftol': 1e-10, 'gtol': 1e-9},
    )
    found.x = start + to_theta @ found.x
    return found


def _slopes(
    theta_Z: np.ndarray, x_P: np.ndarray, y_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log L [P], and its derivatives [Z, P]."""
    a, b, e, alpha, beta = theta_Z
    terms = np.stack([a - alpha * x_P, b - beta * y_P, np.full_like(x_P, e)])
    top_P = terms.max(axis=0)
    shares = np.exp(terms - top_P)
    total_P = shares.sum(axis=0)
    of_a, of_b, of_e = shares / total_P
    return top_P + np.log(total_P), np.stack([of_a, of_b, of_e, -of_a * x_P, -of_b * y_P])


def _law(theta_Z: np.ndarray, means: tuple[float, float]) -> Law:
    a, b, e, alpha, beta = theta_Z.tolist()
    return Law(
        math.exp(e), _exp(a + alpha * means[0]), _exp(b + beta * means[1]), float(alpha), float(beta)
    )


def _exp(x: float) -> float:
    """Infinity beyond floating point: a factor that no data hold back."""
    return math.exp(x) if x < 700 else math.inf

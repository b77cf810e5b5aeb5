"""Geometry of the vectors of pairs (host, numpy): retrieval, alignment, uniformity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llama_jax.evaluate import stats

Result = dict[str, float | int]


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Each row divided by its length, float64."""
    x_ND = np.asarray(x_ND, np.float64)
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12)


def ranks(query_ND: np.ndarray, key_ND: np.ndarray, document_N: np.ndarray) -> np.ndarray:
    """How many keys are at least as near (by cosine) to query i as key i is, others of the same
    document left out: 0 is a hit at the first place.

    A tie counts against the query: vectors that are all equal find nothing.
    """
    cos_NM = unit(query_ND) @ unit(key_ND).T
    own_N1 = np.diagonal(cos_NM)[:, None]
    other_NM = document_N[:, None] != document_N[None, :]
    return ((cos_NM >= own_N1 - 1e-9) & other_NM).sum(axis=1)


def smallest_pool(document_N: np.ndarray) -> int:
    """The fewest keys that a query is looked for in: its own, and those of other documents."""
    _, count = np.unique(document_N, return_counts=True)
    return int(len(document_N) - count.max() + 1) if len(document_N) else 0


def recall(rank_N: np.ndarray, *, seed: int) -> dict[int, Result]:
    """Share of the queries whose own key is among the first 1, 5 and 10."""
    return {k: stats.of_mean(rank_N < k, seed=seed) for k in (1, 5, 10)}


def alignment(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """E |f(x) - f(x+)|^2 of unit vectors (Wang & Isola 2020, section 4.1, alpha 2): 0 is best."""
    return float(_distance(a_ND, b_ND).mean())


def alignment_result(a_ND: np.ndarray, b_ND: np.ndarray, *, seed: int) -> Result:
    """`alignment` with its interval."""
    return stats.of_mean(_distance(a_ND, b_ND), seed=seed)


def uniformity(x_ND: np.ndarray) -> float:
    """log E exp(-2 |f(x) - f(y)|^2) over all pairs of different texts, unit vectors (same, t 2):
    0 where all are equal, lower is more uniform, about -4 at best."""
    return float(_uniformity(x_ND)(np.ones((1, len(x_ND))))[0])


def uniformity_result(x_ND: np.ndarray, *, seed: int) -> Result:
    """`uniformity` with its interval."""
    low, high = stats.bootstrap(_uniformity(x_ND), len(x_ND), seed=seed)
    return stats.result(uniformity(x_ND), low, high, len(x_ND))


def _distance(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    return ((unit(a_ND) - unit(b_ND)) ** 2).sum(axis=-1)


def _uniformity(x_ND: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Of weights [R, n] to [R]."""
    x_ND = unit(x_ND)
    near_NM = np.exp(4 * (x_ND @ x_ND.T) - 4)  # |x - y|^2 = 2 - 2 x.y
    np.fill_diagonal(near_NM, 0.0)
    apart_NM = 1.0 - np.eye(len(x_ND))

    def statistic(w_RN: np.ndarray) -> np.ndarray:
        # A text that was drawn twice is no pair with itself.
        over_R, under_R = (((w_RN @ m_NM) * w_RN).sum(axis=1) for m_NM in (near_NM, apart_NM))
        return np.log(over_R / under_R)

    return statistic

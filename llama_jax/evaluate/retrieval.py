"""Geometry of the vectors of pairs (host, numpy): retrieval, alignment, uniformity."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from llama_jax import installed
from llama_jax.errors import UserError
from llama_jax.evaluate import stats
from llama_jax.evaluate.stats import Result


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


def ranks_of(query_ND: np.ndarray, key_MD: np.ndarray, own_N: np.ndarray) -> np.ndarray:
    """How many other keys are at least as near to query i as its own, key `own_N[i]`, is."""
    cos_NM = unit(query_ND) @ unit(key_MD).T
    own_N1 = np.take_along_axis(cos_NM, own_N[:, None], axis=1)
    return (cos_NM >= own_N1 - 1e-9).sum(axis=1) - 1


def smallest_pool(document_N: np.ndarray) -> int:
    """The fewest keys that a query is looked for in: its own, and those of other documents."""
    _, count = np.unique(document_N, return_counts=True)
    return int(len(document_N) - count.max() + 1) if len(document_N) else 0


def alignment(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """E |f(x) - f(x+)|^2 of unit vectors (Wang & Isola 2020, section 4.1, alpha 2): 0 is best."""
    return float(distance(a_ND, b_ND).mean())


def distance(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """|f(x) - f(x+)|^2 of each pair [n]."""
    return ((unit(a_ND) - unit(b_ND)) ** 2).sum(axis=-1)


def uniformity(x_ND: np.ndarray) -> float:
    """log E exp(-2 |f(x) - f(y)|^2) over all pairs of different texts, unit vectors (same, t 2):
    0 where all are equal, lower is more uniform, about -4 at best."""
    return float(_uniformity(x_ND)(np.ones((1, len(x_ND))))[0])


def uniformity_result(x_ND: np.ndarray, *, seed: int) -> Result:
    """`uniformity` with its interval."""
    low, high = stats.bootstrap(_uniformity(x_ND), len(x_ND), seed=seed)
    return stats.result(uniformity(x_ND), low, high, len(x_ND))


def _uniformity(x_ND: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Of weights [R, n] to [R]."""
    x_ND = unit(x_ND)
    near_NM = np.exp(4 * (x_ND @ x_ND.T) - 4)  # |x - y|^2 = 2 - 2 x.y
    np.fill_diagonal(near_NM, 0.0)
    apart_NM = 1.0 - np.eye(len(x_ND))

    def statistic(w_RN: np.ndarray) -> np.ndarray:
        # A text that was drawn twice is no pair with itself.
        over_R, under_R = (((w_RN @ m_NM) * w_RN).sum(axis=1) for m_NM in (near_NM, apart_NM))
        some_R = under_R > 0  # else one text was drawn alone: no pair, and no value
        return np.log(over_R[some_R] / under_R[some_R])

    return statistic


def whitening(x_ND: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A map under which vectors such as `x_ND` have mean 0 and the same variance in all directions
    (Su et al. 2021, section 3), fitted on texts that nothing is looked for in. The covariance is
    shrunk as Ledoit & Wolf (2004) say, so that directions in which few texts differ do not rule."""
    try:
        from sklearn.covariance import ledoit_wolf
    except ImportError as error:
        raise UserError(f'whitening needs scikit-learn: {installed.extra("compare")}') from error
    x_ND = unit(x_ND)
    mean_D = x_ND.mean(axis=0)
    covariance_DD, _ = ledoit_wolf(x_ND - mean_D, assume_centered=True)
    value_D, vector_DD = np.linalg.eigh(covariance_DD)
    # Equal vectors have no variance, and no direction that could be scaled.
    scale_D = np.where(value_D > 1e-12, 1 / np.sqrt(np.maximum(value_D, 1e-12)), 0.0)
    return lambda x_ND: (unit(x_ND) - mean_D) @ (vector_DD * scale_D)


def effective_rank(x_ND: np.ndarray) -> float:
    """exp of the entropy of the singular values of the centred unit vectors (Roy & Vetterli 2007):
    in how many directions texts differ; 0 where they are all equal."""
    x_ND = unit(x_ND)
    value_K = np.linalg.svd(x_ND - x_ND.mean(axis=0), compute_uv=False)
    # Vectors are of float32: what is smaller is rounding.
    value_K = value_K[value_K > 1e-5 * math.sqrt(len(x_ND))]
    if not value_K.size:
        return 0.0
    p_K = value_K / value_K.sum()
    return float(np.exp(-(p_K * np.log(np.maximum(p_K, 1e-300))).sum()))


def effective_rank_result(x_ND: np.ndarray) -> Result:
    """`effective_rank` with its interval."""
    return stats.jackknife(
        lambda w_RN: np.array([effective_rank(x_ND[w_N > 0]) for w_N in w_RN]), len(x_ND)
    )

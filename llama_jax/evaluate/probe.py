"""Linear probe of frozen features: what a linear map can read from each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax import installed
from llama_jax.errors import UserError
from llama_jax.evaluate import stats


class Part(NamedTuple):
    """Examples with frozen features of every layer."""

    x_LND: np.ndarray
    label_N: np.ndarray


def probe(
    train: Part, validation: Part, test: Part, *, seed: int
) -> tuple[dict[str, float | int], list[float]]:
    """Test accuracy of the layer that is best on validation, and test accuracy of every layer.

    A logistic regression (L2, C = 1) for each layer, on features standardised by the training part
    (Alain & Bengio 2017). Among layers that are equally good the lowest is taken.
    """
    right_LN, validated = [], []
    for layer in range(len(train.x_LND)):
        predict = _fit(train.x_LND[layer], train.label_N)
        validated.append(np.mean(predict(validation.x_LND[layer]) == validation.label_N))
        right_LN.append(predict(test.x_LND[layer]) == test.label_N)
    best = int(np.argmax(validated))
    return stats.of_mean(right_LN[best], seed=seed), [float(right.mean()) for right in right_LN]


def _fit(x_ND: np.ndarray, label_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError(
            f'the linear probe needs scikit-learn: {installed.extra("compare")}'
        ) from error
    mean_D = x_ND.mean(axis=0, dtype=np.float64)
    # A feature without variance (a unit that is off) says nothing: it stays 0.
    std_D = np.maximum(x_ND.std(axis=0, dtype=np.float64), 1e-8)

    def standard(x_ND: np.ndarray) -> np.ndarray:
        return (x_ND - mean_D) / std_D

    model = LogisticRegression(C=1.0, max_iter=300)
    with warnings.catch_warnings():
        # Where the classes can be parted, 300 steps leave the direction as good as final.
        warnings.simplefilter('ignore', ConvergenceWarning)
        model.fit(standard(x_ND), label_N)
    return lambda x_ND: model.predict(standard(x_ND))


def labels(chunks: Sequence) -> np.ndarray:
    """Labels [n] of chunks."""
    return np.array([chunk.label for chunk in chunks], np.int32)

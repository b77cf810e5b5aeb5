"""Linear probe of frozen features: what a linear map can read from each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax import installed
from llama_jax.errors import UserError


class Part(NamedTuple):
    """Examples with frozen features of every layer."""

    x_LND: np.ndarray
    label_N: np.ndarray


class Probed(NamedTuple):
    right_LN: np.ndarray
    """Whether each test example is classified rightly, from each layer; the embedding is first."""
    validation_L: np.ndarray
    """Accuracy on the validation part."""

    @property
    def layer(self) -> int:
        """The layer that is best on validation, the lowest of those that are equally good. 0: the
        embedding, of which every token has the same vector in every text."""
        return int(np.argmax(self.validation_L))

    @property
    def contextual(self) -> int:
        """The same among the layers that see the other tokens."""
        return 1 + int(np.argmax(self.validation_L[1:]))

    def chosen(self) -> dict[str, object]:
        """For the record: the layers that validation chose, and by what."""
        return {
            'best': self.layer,
            'contextual': self.contextual,
            'validation': self.validation_L.tolist(),
        }


def probe(train: Part, validation: Part, test: Part) -> Probed:
    """A logistic regression (L2, C = 1) for each layer, on features standardised by the training
    part (Alain & Bengio 2017)."""
    right_LN, validated = [], []
    for layer in range(len(train.x_LND)):
        predict = _fit(train.x_LND[layer], train.label_N)
        validated.append(np.mean(predict(validation.x_LND[layer]) == validation.label_N))
        right_LN.append(predict(test.x_LND[layer]) == test.label_N)
    return Probed(np.array(right_LN), np.array(validated))


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

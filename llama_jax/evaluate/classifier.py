"""The classes that a trained head gives to texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from llama_jax import precision
from llama_jax.data.record import Labelled
from llama_jax.errors import UserError
from llama_jax.evaluate.represent import ROWS, batches, host, place, round_up
from llama_jax.generate import finite
from llama_jax.mesh import batch_shards
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.objectives.classify import Classification, shortened
from llama_jax.train.restore import Trained


class Classifier:
    """Log-probabilities of classes, by a run of Classification."""

    def __init__(
        self, trained: Trained, mesh: Mesh, *, rows: int = ROWS, compute: Compute | None = None
    ):
        """`rows`: texts of a batch, at most; `compute`: default: that of the run. Raises UserError
        for a run of another objective."""
        objective = trained.experiment.objective
        if not isinstance(objective, Classification):
            raise UserError(
                f'the run {trained.experiment.name} was trained by {type(objective).__name__}, and '
                'has no head that classifies: give one of Classification'
            )
        compute = trained.experiment.compute if compute is None else compute
        self._trained, self._objective, self._mesh, self._rows = trained, objective, mesh, rows
        self._step = _step(trained.config, objective, compute)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the head."""
        return self._objective.labels

    def parts(self, text: str, other: str | None = None) -> tuple[np.ndarray, ...]:
        """Ids of a text, or of a pair, without the end token. Raises BadRecordError for an empty
        text."""
        tokenizer = self._trained.tokenizer
        record = Labelled(text, self.labels[0], other)  # any label: it is asked for
        return self._objective.encoded(record, vocabulary=tokenizer, chat=None).parts

    def __call__(self, texts: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
        """Float64 [n, C] of texts as `parts` gives them; of one that is longer than the context the
        end is left out. Raises NotFiniteError where the model computes no numbers."""
        longest, eos_id = self._trained.config.context, self._trained.tokenizer.eos_id
        ids = [
            np.concatenate([*shortened(parts, longest - 1), [eos_id]]).astype(np.int32)
            for parts in texts
        ]
        found = np.zeros((len(texts), len(self.labels)))
        rows = round_up(min(self._rows, len(texts)), batch_shards(self._mesh))
        with jax.set_mesh(self._mesh):
            for index, token_BT, segment_BT in batches(ids, rows=rows, longest=longest):
                log_BC = self._step(
                    self._trained.params,
                    self._trained.extra,
                    place(token_BT, self._mesh),
                    place(segment_BT, self._mesh),
                )
                found[index] = host(log_BC)[: len(index)]
        if not np.isfinite(found).all():
            raise finite.error('the model gives', self._trained.params)
        return found


@functools.lru_cache(maxsize=8)
def _step(config: ModelConfig, objective: Classification, compute: Compute) -> jax.stages.Wrapped:
    def log_probabilities(
        params: Params, extra: Params, token_BT: jax.Array, segment_BT: jax.Array
    ) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(token_BT.shape[1]), token_BT.shape)
        batch = {'inputs': token_BT, 'segments': segment_BT, 'positions': positions}
        with precision.matmuls(compute.precision):
            model = layers.bind(config, params)
            logit_BMC = objective.logits(model, batch, extra=extra, compute=compute)
        return jax.reshard(jax.nn.log_softmax(logit_BMC[:, 0]), PartitionSpec())

    return jax.jit(log_probabilities)


class Predicted(NamedTuple):
    """For each text, in the order given."""

    labels: tuple[str, ...]
    """Names of the classes."""
    probability_NC: np.ndarray
    """Float32, of each class."""

    @property
    def best(self) -> list[str]:
        """The most likely class of each text."""
        return [self.labels[i] for i in self.probability_NC.argmax(axis=1)]


def classified(
    trained: Trained,
    texts: Sequence[str | tuple[str, str]],
    mesh: Mesh,
    *,
    batch: int = 16,
    compute: Compute | None = None,
) -> Predicted:
    """The classes of texts, or of pairs of texts, by a run that was tuned to classify: load it with
    `train.restore.load`. Texts longer than the context lose their end, the longest of a pair first.

    Raises UserError for a run of another objective, and for an empty text; NotFiniteError where the
    model computes no numbers.
    """
    classify = Classifier(trained, mesh, rows=batch, compute=compute)
    parts = []
    for i, text in enumerate(texts):
        one, other = (text, None) if isinstance(text, str) else text
        try:
            parts.append(classify.parts(one, other))
        except ValueError as error:
            raise UserError(f'text {i}: {error}') from None
    return Predicted(classify.labels, np.exp(classify(parts)).astype(np.float32))

"""A trained head that names the class of a text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from llama_jax import precision
from llama_jax.data.record import Labelled
from llama_jax.evaluate.represent import ROWS, batches, host, place, round_up
from llama_jax.generate import finite
from llama_jax.mesh import batch_shards
from llama_jax.model import layers
from llama_jax.objectives.classify import Classification, shortened
from llama_jax.train.restore import Trained


class Classifier:
    """Log-probabilities of classes, by a run of Classification."""

    def __init__(self, trained: Trained, mesh: Mesh):
        objective = trained.experiment.objective
        assert isinstance(objective, Classification), objective
        self._trained, self._objective, self._mesh = trained, objective, mesh
        self._step = jax.jit(functools.partial(_step, trained, objective))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the head."""
        return self._objective.labels

    def parts(self, text: str, other: str | None) -> tuple[np.ndarray, ...]:
        """Ids of a text, or of a pair, without the end token."""
        tokenizer = self._trained.tokenizer
        record = Labelled(text, self.labels[0], other)  # any label: it is asked for
        return self._objective.encoded(record, vocabulary=tokenizer, chat=None).parts

    def __call__(self, texts: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
        """Float64 [n, C] of texts as `parts` gives them; of one that is longer than the context the
        end is left out. Raises NotFiniteError where the model computes no numbers."""
        longest, eos_id = self._trained.config.context, self._trained.tokenizer.eos_id
        rows = [
            np.concatenate([*shortened(parts, longest - 1), [eos_id]]).astype(np.int32)
            for parts in texts
        ]
        found = np.zeros((len(texts), len(self.labels)))
        n = round_up(min(ROWS, len(texts)), batch_shards(self._mesh))
        with jax.set_mesh(self._mesh):
            for index, token_BT, segment_BT in batches(rows, rows=n, longest=longest):
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


def _step(
    trained: Trained,
    objective: Classification,
    params: Any,
    extra: Any,
    token_BT: jax.Array,
    segment_BT: jax.Array,
) -> jax.Array:
    compute = trained.experiment.compute
    positions = jnp.broadcast_to(jnp.arange(token_BT.shape[1]), token_BT.shape)
    batch = {'inputs': token_BT, 'segments': segment_BT, 'positions': positions}
    with precision.matmuls(compute.precision):
        model = layers.bind(trained.config, params)
        logit_BMC = objective.logits(model, batch, extra=extra, compute=compute)
    return jax.reshard(jax.nn.log_softmax(logit_BMC[:, 0]), PartitionSpec())

"""The classes that a tuned classifier gives to texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from llama_jax import precision
from llama_jax.data import packing
from llama_jax.data.pieces import Piece
from llama_jax.data.record import Labelled
from llama_jax.errors import UserError
from llama_jax.evaluate.represent import host, padded, place, round_up
from llama_jax.mesh import batch_shards
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.objectives.base import Batch
from llama_jax.objectives.classify import Classification
from llama_jax.train.restore import Trained


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

    Raises UserError for a run of another objective, and for an empty text.
    """
    objective = trained.experiment.objective
    if not isinstance(objective, Classification):
        raise UserError(
            f'the run {trained.experiment.name} was trained by {type(objective).__name__}, and has '
            'no head that classifies: give one of Classification'
        )
    if not texts:
        return Predicted(objective.labels, np.zeros((0, len(objective.labels)), np.float32))
    context = trained.config.context
    examples = []
    for i, text in enumerate(texts):
        one, other = (text, None) if isinstance(text, str) else text
        try:
            encoded = objective.encoded(
                Labelled(one, objective.labels[0], other), vocabulary=trained.tokenizer, chat=None
            )
        except ValueError as error:
            raise UserError(f'text {i}: {error}') from None
        (size,) = objective.whole(tuple(map(len, encoded.parts)), seq_len=context)
        piece = Piece(encoded.parts[0], 0, 0, 0.0, (min(size, context),), 0, encoded)
        example = objective.example(
            piece, tokenizer=trained.tokenizer, seq_len=context, rng=np.random.default_rng(0)
        )
        assert example is not None
        examples.append(example)
    # Rows of like length together, of a few lengths, for each is a program.
    order = sorted(range(len(texts)), key=lambda i: len(examples[i]['inputs']))
    rows = round_up(batch, batch_shards(mesh))
    compute = trained.experiment.compute if compute is None else compute
    probabilities = _program(trained.config, objective, compute)
    probability_NC = np.zeros((len(texts), len(objective.labels)), np.float32)
    array_layout = packing.layout_of(examples[0], pad_id=trained.tokenizer.pad_id)
    with jax.set_mesh(mesh):
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            length = padded(len(examples[chosen[-1]]['inputs']), context)
            lengths = {'': length}
            arrays = packing.empty_rows(array_layout, rows=rows, lengths=lengths)
            for row, i in enumerate(chosen):
                packing.lay(arrays, row, [examples[i]], lengths=lengths)
            placed = {name: place(x, mesh) for name, x in arrays.items()}
            found_BC = probabilities(trained.params, trained.extra, placed)
            probability_NC[chosen] = host(found_BC)[: len(chosen)]
    return Predicted(objective.labels, probability_NC)


@functools.lru_cache(maxsize=8)
def _program(
    config: ModelConfig, objective: Classification, compute: Compute
) -> jax.stages.Wrapped:
    def probabilities(params: Params, extra: Params, batch: Batch) -> jax.Array:
        model = layers.bind(config, params)
        with precision.matmuls(compute.precision):
            logit_BMC = objective.logits(model, batch, extra=extra, compute=compute)
        return jax.reshard(jax.nn.softmax(logit_BMC[:, 0]), PartitionSpec())

    return jax.jit(probabilities)

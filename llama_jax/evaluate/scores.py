"""Log-probabilities that a model gives to the targets of examples, one example a row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout, precision
from llama_jax.evaluate.represent import host, place, round_up
from llama_jax.generate import finite
from llama_jax.mesh import batch_shards
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.objectives.prediction import ENCODER

ROWS = 16
"""Examples per batch."""
MULTIPLE = 32
"""Rows are padded to a multiple of this."""

Read = Callable[..., jax.Array]
Example = dict[str, np.ndarray]
"""As an objective makes it: 'inputs', 'targets', 'weights', perhaps 'prefix' and 'encoder/inputs';
'never', the token of each place that has no probability there; and what its own `read` takes."""


class Scores(NamedTuple):
    """At the places of an example whose weight is positive, in order; [n, P], 0 beyond them."""

    log_p: np.ndarray
    """log p(target), in nats."""
    chosen: np.ndarray
    """The most likely token."""
    confidence: np.ndarray
    """Its log-probability."""
    ordinary: np.ndarray
    """log p(target) among the tokens that are no control tokens."""


class Scorer:
    """Scores examples under one model; `sees_all` and `read` as `asked.Question` has them."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        sees_all: bool,
        compute: Compute,
        mesh: Mesh,
        byte_lengths: np.ndarray,
        read: Read | None = None,
    ):
        """`byte_lengths` [V]: of each token of the vocabulary; those of 0 are control tokens."""
        self._params, self._mesh, self._longest = params, mesh, config.context
        self._ordinary_V = byte_lengths > 0
        self._precision = compute.precision
        self._step = _score_step(config, sees_all=sees_all, compute=compute, read=read)

    def __call__(self, examples: Sequence[Example]) -> Scores:
        """Scores of each example, in their order. All examples have the same keys. Raises
        NotFiniteError where a target has no log-probability."""
        rows = round_up(ROWS, batch_shards(self._mesh))
        lengths = {
            key: min(
                round_up(max(len(example[key]) for example in examples), MULTIPLE), self._longest
            )
            for key in examples[0]
        }
        read = [np.flatnonzero(example['weights'] > 0) for example in examples]
        P = max(len(places) for places in read)
        types = (np.float32, np.int32, np.float32, np.float32)
        out = Scores(*(np.zeros((len(examples), P), kind) for kind in types))
        with jax.set_mesh(self._mesh):
            for start in range(0, len(examples), rows):
                part = slice(start, start + rows)
                batch, read_BP, target_BP = _batch(examples[part], read[part], rows, lengths, P)
                arrays = {key: place(array, self._mesh) for key, array in batch.items()}
                values = self._step(
                    self._params,
                    arrays,
                    place(read_BP, self._mesh),
                    place(target_BP, self._mesh),
                    self._ordinary_V,
                )
                for whole, value in zip(out, values, strict=True):
                    whole[part] = host(value)[: len(whole[part])]
        for i, places in enumerate(read):
            for whole in out:
                whole[i, len(places) :] = 0
        if not np.isfinite(out.log_p).all():
            raise finite.error('the model gives', self._params, self._precision)
        return out


@functools.lru_cache(maxsize=8)
def _score_step(config: ModelConfig, *, sees_all: bool, compute: Compute, read: Read | None) -> Any:
    def step(
        params: Params,
        batch: dict[str, jax.Array],
        read_BP: Int[Array, 'B P'],
        target_BP: Int[Array, 'B P'],
        ordinary_V: Bool[Array, ' V'],
    ) -> tuple[jax.Array, ...]:
        model = layers.bind(config, params)
        with precision.matmuls(compute.precision):
            if read is not None:
                x_BTD = read(model, batch, compute=compute)
            else:
                x_BTD = _features(model, batch, sees_all=sees_all, compute=compute)
            place_BPT = read_BP[:, :, None] == jnp.arange(x_BTD.shape[1])
            x_BPD = jnp.einsum('BPT,BTD->BPD', place_BPT.astype(x_BTD.dtype), x_BTD)
            logit_BPV = model.logits(x_BPD)
            if 'never' in batch:
                never_BP = jnp.einsum('BPT,BT->BP', place_BPT.astype(jnp.int32), batch['never'])
                is_never_BPV = never_BP[:, :, None] == jnp.arange(logit_BPV.shape[-1])
                logit_BPV = jnp.where(is_never_BPV, -jnp.inf, logit_BPV)
        # The vocabulary whole on the devices of each row.
        log_p_BPV = jax.nn.log_softmax(jax.reshard(logit_BPV, layout.rows()))
        V = log_p_BPV.shape[-1]
        is_target_BPV = target_BP[:, :, None] == jnp.arange(V)
        log_p_BP = jnp.sum(jnp.where(is_target_BPV, log_p_BPV, 0), axis=-1)
        # Rows of the embedding beyond the vocabulary are no ordinary tokens.
        whole_V = jnp.pad(ordinary_V, (0, V - len(ordinary_V)))
        among_BP = jax.nn.logsumexp(jnp.where(whole_V, log_p_BPV, -jnp.inf), axis=-1)
        found = (
            log_p_BP,
            jnp.argmax(log_p_BPV, axis=-1),
            jnp.max(log_p_BPV, axis=-1),
            log_p_BP - among_BP,
        )
        return jax.tree.map(lambda x_BP: jax.reshard(x_BP, PartitionSpec()), found)

    return jax.jit(step)


def _features(
    model: Any, batch: dict[str, jax.Array], *, sees_all: bool, compute: Compute
) -> Float[Array, 'B T D']:
    """Features under what TokenPrediction.loss lets be seen."""
    visible: dict[str, Any] = {'causal': not sees_all}
    if 'prefix' in batch:
        visible['prefix_BT'] = batch['prefix']
    if f'{ENCODER}/inputs' in batch:
        visible['memory'] = model.encode(
            batch[f'{ENCODER}/inputs'],
            segment_BS=batch[f'{ENCODER}/segments'],
            compute=compute,
        )
    return model.features(
        batch['inputs'], segment_BT=batch['segments'], compute=compute, **visible
    )[0]


def _batch(
    examples: Sequence[Example],
    read: Sequence[np.ndarray],
    rows: int,
    lengths: dict[str, int],
    P: int,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """What the model reads, where its predictions are read, and what is scored there."""
    used = [key for key in examples[0] if key not in ('targets', 'weights')]
    batch = {key: np.zeros((rows, lengths[key]), np.int32) for key in used}
    for key in [key for key in used if key.endswith('inputs')]:
        segments = key.removesuffix('inputs') + 'segments'
        batch[segments] = np.zeros((rows, lengths[key]), np.int32)
        for row, example in enumerate(examples):
            batch[segments][row, : len(example[key])] = 1
    read_BP, target_BP = np.zeros((rows, P), np.int32), np.zeros((rows, P), np.int32)
    for row, (example, places) in enumerate(zip(examples, read, strict=True)):
        for key in used:
            batch[key][row, : len(example[key])] = example[key]
        read_BP[row, : len(places)] = places
        target_BP[row, : len(places)] = example['targets'][places]
    return batch, read_BP, target_BP

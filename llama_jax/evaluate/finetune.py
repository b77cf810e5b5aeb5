"""Fine-tuned classification: the whole backbone and a linear head, a few steps of AdamW."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from llama_jax import precision
from llama_jax.evaluate.represent import (
    features,
    host,
    padded,
    padded_rows,
    place,
    pooled,
    round_up,
)
from llama_jax.mesh import batch_shards
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.train.base import merged

WARMUP = 0.1
"""Share of the steps over which the rate rises; it falls as a cosine to 0 after."""
DECAY = 0.01
HEAD = 10.0
"""Scale of the head's logits: under AdamW its weights, which begin at 0 and have few steps, then
move this many times as far as the backbone's."""


class Budget(NamedTuple):
    """The same for every arm."""

    steps: int
    batch: int
    rate: float


class _Programs(NamedTuple):
    optimizer: optax.GradientTransformation
    step: Any
    predict: Any


def accuracy(
    config: ModelConfig,
    params: Params,
    train: Sequence[np.ndarray],
    train_label_N: np.ndarray,
    test: Sequence[np.ndarray],
    test_label_N: np.ndarray,
    *,
    n_classes: int,
    budget: Budget,
    causal: bool,
    compute: Compute,
    seed: int,
    mesh: Mesh,
) -> np.ndarray:
    """Whether each test text [n] is classified rightly after fine-tuning a copy of `params`.

    `seed` decides the order of the training texts; the head begins at 0.
    """
    rows = round_up(budget.batch, batch_shards(mesh))
    length = padded(max(len(text) for text in (*train, *test)), config.context)
    programs = _programs(config, causal=causal, compute=compute, budget=budget)
    rng = np.random.default_rng(seed)
    params = merged(params, mesh)  # adapters of a run are part of what is tuned
    with jax.set_mesh(mesh):
        head_DC = jax.device_put(np.zeros((config.dim, n_classes), np.float32), PartitionSpec())
        tuned = {'backbone': params, 'head': head_DC}
        state = programs.optimizer.init(tuned)
        order: list[int] = []
        for _ in range(budget.steps):
            while len(order) < budget.batch:
                order.extend(rng.permutation(len(train)).tolist())
            index, order = order[: budget.batch], order[budget.batch :]
            batch = _batch([train[i] for i in index], train_label_N[index], rows, length)
            tuned, state = programs.step(tuned, state, *(place(x, mesh) for x in batch))
        right = []
        for start in range(0, len(test), rows):
            part = slice(start, start + rows)
            token_BT, segment_BT, label_B, _ = _batch(test[part], test_label_N[part], rows, length)
            chosen_B = programs.predict(tuned, place(token_BT, mesh), place(segment_BT, mesh))
            right.append((host(chosen_B) == label_B)[: len(test[part])])
    return np.concatenate(right)


@functools.lru_cache(maxsize=8)
def _programs(config: ModelConfig, *, causal: bool, compute: Compute, budget: Budget) -> _Programs:
    warmup = max(1, round(WARMUP * budget.steps))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, budget.rate, warmup, budget.steps),
            weight_decay=DECAY,
        ),
    )

    def logits(
        tuned: Params, token_BT: Int[Array, 'B T'], segment_BT: Int[Array, 'B T']
    ) -> Float[Array, 'B C']:
        x_BTD = features(
            config, tuned['backbone'], token_BT, segment_BT, causal=causal, compute=compute
        )
        return HEAD * jnp.einsum('BD,DC->BC', pooled(x_BTD, segment_BT), tuned['head'])

    def loss(tuned: Params, token_BT: Any, segment_BT: Any, label_B: Any, weight_B: Any) -> Any:
        log_BC = jax.nn.log_softmax(logits(tuned, token_BT, segment_BT))
        chosen_BC = label_B[:, None] == jnp.arange(log_BC.shape[1])
        nll_B = -jnp.sum(jnp.where(chosen_BC, log_BC, 0), axis=1)
        return jnp.sum(nll_B * weight_B) / jnp.sum(weight_B)

    def step(tuned: Params, state: Any, *batch: jax.Array) -> tuple[Params, Any]:
        with precision.matmuls(compute.precision):
            grads = jax.grad(loss)(tuned, *batch)
        updates, state = optimizer.update(grads, state, tuned)
        return optax.apply_updates(tuned, updates), state

    def predict(tuned: Params, token_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
        chosen_B = jnp.argmax(logits(tuned, token_BT, segment_BT), axis=-1)
        return jax.reshard(chosen_B, PartitionSpec())

    return _Programs(optimizer, jax.jit(step), jax.jit(predict))


def _batch(
    texts: Sequence[np.ndarray], labels: np.ndarray, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, segments [rows, T], labels, weights [rows]); rows beyond the texts weigh 0."""
    label_B, weight_B = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    label_B[: len(texts)], weight_B[: len(texts)] = labels, 1
    return *padded_rows(texts, rows=rows, length=length), label_B, weight_B

"""Validation: likelihood of held-out text in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import precision
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.objectives.base import Batch, Loss, Objective

LossStep = Callable[[Params, Batch], Loss]


def loss_step(config: ModelConfig, objective: Objective, compute: Compute) -> LossStep:
    """A compiled function (params, batch) -> loss sums, without dropout."""

    def step(params: Params, batch: Batch) -> Loss:
        with precision.matmuls(compute.precision):
            model = layers.bind(config, params)
            return objective.loss(model, batch, compute=compute, key=None)

    return jax.jit(step)


def validate(
    step: LossStep,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    place: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    byte_lengths: np.ndarray,
) -> dict[str, Any]:
    """Loss over all `batches`, and bits per byte where the objective has a likelihood.

    Args:
      batches: this process's share of each global batch.
      place: puts a share on the devices as part of the global batch.
      byte_lengths: UTF-8 bytes of each token [V].

    Returns 'loss' and the objective's metrics per unit of weight, 'bytes', 'bits_per_byte'.
    """
    sums: dict[str, float] = {}
    n_bytes = 0
    pending: Loss | None = None

    def collect(loss: Loss | None) -> None:
        if loss is not None:
            values = {'loss': loss.total, 'weight': loss.weight, **loss.metrics}
            for name, value in jax.device_get(values).items():  # one transfer; adds in float64
                sums[name] = sums.get(name, 0.0) + float(value)

    for batch in batches:
        n_bytes += int(byte_lengths[batch['targets']][batch['weights'] > 0].sum())
        loss = step(params, place(batch))
        collect(pending)  # while the devices compute this batch
        pending = loss
    collect(pending)

    n_bytes = _over_processes(n_bytes)
    weight = sums.pop('weight', 0.0)
    result: dict[str, Any] = {name: total / max(weight, 1.0) for name, total in sums.items()}
    result['bytes'] = n_bytes
    if 'nll' in sums and n_bytes:
        result['bits_per_byte'] = sums['nll'] / math.log(2) / n_bytes
    return result


def _over_processes(count: int) -> int:
    if jax.process_count() == 1:
        return count
    from jax.experimental import multihost_utils

    # Two halves: without 64-bit mode an array holds no more than 32 bits.
    halves = jnp.asarray([count >> 20, count & 0xFFFFF], jnp.int32)
    high, low = np.asarray(multihost_utils.process_allgather(halves)).reshape(-1, 2).sum(0)
    return (int(high) << 20) + int(low)

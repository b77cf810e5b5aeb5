"""Validation: likelihood of held-out text in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import precision
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.objectives.base import Batch, Loss, Objective
from llama_jax.train.step import loss_of

LossStep = Callable[[Params, Batch], Loss]


def loss_step(config: ModelConfig, objective: Objective, compute: Compute) -> LossStep:
    """A compiled function (params, batch) -> loss sums, without dropout."""

    def step(params: Params, batch: Batch) -> Loss:
        with precision.matmuls(compute.precision):
            return loss_of(config, objective, params, batch, compute=compute, key=None)

    return jax.jit(step)


def validate(
    step: LossStep,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    place: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    byte_lengths: np.ndarray | None,
) -> dict[str, Any]:
    """Loss over all `batches`, and bits per byte where the objective has a likelihood.

    Args:
      batches: this process's share of each global batch.
      place: puts a share on the devices as part of the global batch.
      byte_lengths: UTF-8 bytes of each token [V]; None for an objective without a likelihood.

    Returns 'loss' and the objective's metrics per unit of weight; with a likelihood also 'bytes'
    and 'bits_per_byte'.
    """
    sums: dict[str, float] = {}
    pending: tuple[Loss, jax.Array] | None = None

    def collect(pending: tuple[Loss, jax.Array] | None) -> None:
        if pending is not None:
            loss, n_bytes = pending
            values = {'loss': loss.total, 'weight': loss.weight, 'bytes': n_bytes, **loss.metrics}
            for name, value in jax.device_get(values).items():  # one transfer; adds in float64
                sums[name] = sums.get(name, 0.0) + float(value)

    for batch in batches:
        n_bytes = jnp.zeros(())
        if byte_lengths is not None:
            bytes_BT = np.where(batch['weights'] > 0, byte_lengths[batch['targets']], 0)
            # Summed on the devices: they know which rows are held by several processes.
            n_bytes = jnp.sum(place({'bytes': bytes_BT.astype(np.int32)})['bytes'])
        loss = step(params, place(batch))
        collect(pending)  # while the devices compute this batch
        pending = loss, n_bytes
    collect(pending)

    weight, total_bytes = sums.pop('weight', 0.0), int(sums.pop('bytes', 0))
    result: dict[str, Any] = {name: total / max(weight, 1.0) for name, total in sums.items()}
    if byte_lengths is None:
        return result
    result['bytes'] = total_bytes
    if total_bytes:
        result['bits_per_byte'] = sums['nll'] / math.log(2) / total_bytes
    return result

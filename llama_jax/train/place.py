"""Where the rows of a batch lie, and what all processes know of each other's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax import layout
from llama_jax.train.experiment import Experiment

HostBatch = dict[str, Any]
"""Arrays by name, the text `cursor`, and figures: floats about the batch, for the records."""


def place(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays [B, T] of the global batch, from each process's rows of it."""
    sharding = NamedSharding(mesh, layout.act('BT'))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows)
        for name, rows in batch.items()
        if isinstance(rows, np.ndarray)
    }


def figures(batch: HostBatch) -> dict[str, float]:
    """Those of a batch."""
    return {name: x for name, x in batch.items() if isinstance(x, float)}


def rows_here(experiment: Experiment, mesh: Mesh, rows: int = 0) -> list[int] | None:
    """Which of the rows of a batch are read by this process; None: all of them, prompts to which
    one process alone writes completions. `rows`: of the batch; 0: as many as a step reads."""
    if experiment.objective.rollout is not None:
        return None
    return local_rows(mesh, rows or experiment.train.batch)


def local_rows(mesh: Mesh, batch: int) -> list[int]:
    """Rows of a global batch that this process's devices hold, in order.

    On a pod these need not be neighbours, and where tensor parallelism spans hosts, several
    processes hold the same.
    """
    places = NamedSharding(mesh, layout.rows()).addressable_devices_indices_map((batch,))
    slices = [index[0] for index in places.values() if index]
    return sorted({row for rows in slices for row in range(*rows.indices(batch))})


def largest(values: Sequence[int], mesh: Mesh) -> jax.Array | np.ndarray:
    """The largest of each of `values` over all processes. They agree on the devices, behind what
    these are at, and none waits here."""
    mine = np.array([values], np.int32)
    if jax.process_count() == 1:
        return mine[0]
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names, None))
    shape = (mesh.size, len(values))
    return jnp.max(jax.make_array_from_callback(shape, each, lambda _: mine), axis=0)

"""The device mesh: which devices there are and along which axes work is divided.

Every run has a mesh, even one device. All axes are of explicit type: each array's type says where
its pieces lie, and an operation that would need data to move fails at trace time unless it says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.errors import UserError


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; one of them may be -1: all that remain."""

    slice: int = 1
    """Slices joined by the data-centre network: pure data parallelism."""
    data: int = 1
    """Replicas of the parameters: the batch is divided, gradients are summed."""
    fsdp: int = -1
    """Fully sharded data parallelism: batch, parameters and optimizer state are divided."""
    tensor: int = 1
    """Tensor parallelism: heads, hidden units and vocabulary are divided."""


AXES = ('slice', 'data', 'fsdp', 'tensor')


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all). Raises UserError when they do not fit."""
    devices = jax.devices() if devices is None else list(devices)
    shape = _resolve(config, len(devices))
    n_slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if shape[0] == 1:
        if n_slices > 1 and devices[0].platform == 'tpu':
            # Nodes of GPUs are slices to JAX, and FSDP over them is usual.
            raise UserError(
                f'mesh with slice 1: these TPUs form {n_slices} slices, and no other axis may '
                f'cross the network between them; set --mesh.slice {n_slices}'
            )
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        if n_slices != shape[0]:
            raise UserError(
                f'mesh with slice {shape[0]}: these devices form {n_slices} slice(s); '
                f'set --mesh.slice {n_slices}, or --mesh.data for replicas within one'
            )
        across = (shape[0], *[1] * (len(shape) - 1))
        within = (1, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _resolve(config: MeshConfig, n_devices: int) -> tuple[int, ...]:
    sizes = [getattr(config, axis) for axis in AXES]
    shown = ', '.join(f'{axis} {size}' for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f'mesh ({shown}): sizes are positive, and at most one is -1 (the rest)')
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and n_devices % known == 0:
        sizes[sizes.index(-1)] = n_devices // known
    if math.prod(sizes) != n_devices:
        raise UserError(
            f'mesh ({shown}) does not fit {n_devices} device(s): '
            f'the product of the sizes must be {n_devices}; leave one axis at -1 to take the rest'
        )
    return tuple(sizes)


def platform_in_use() -> str:
    """'cpu', 'gpu' or 'tpu': the devices of the mesh in use. That of a TPU which is only described
    (tpu/plan.py) counts too."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return 'gpu' if platform in ('cuda', 'rocm') else platform


def batch_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of pieces into which the mesh divides a batch."""
    return mesh.shape['slice'] * mesh.shape['data'] * mesh.shape['fsdp']

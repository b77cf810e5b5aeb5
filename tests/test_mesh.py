"""The mesh: sizes that fit, and one line for those that do not."""

from dataclasses import dataclass, replace

import jax
import pytest
from jax.sharding import AxisType

from llama_jax import mesh
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig


@pytest.mark.parametrize(
    ('config', 'sizes'),
    [
        (MeshConfig(), (1, 1, 8, 1)),
        (MeshConfig(tensor=2), (1, 1, 4, 2)),
        (MeshConfig(data=-1, fsdp=2), (1, 4, 2, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (1, 2, 2, 2)),
    ],
)
def test_the_rest_of_the_devices_goes_to_the_open_axis(config, sizes):
    made = mesh.make(config)
    assert tuple(made.shape.values()) == sizes
    assert tuple(made.shape) == mesh.AXES
    assert set(made.axis_types) == {AxisType.Explicit}
    assert len(set(made.devices.flat)) == 8
    assert mesh.batch_shards(made) == sizes[0] * sizes[1] * sizes[2]


def test_devices_may_be_named():
    made = mesh.make(MeshConfig(), jax.devices()[2:4])
    assert list(made.devices.flat) == jax.devices()[2:4]


@dataclass(frozen=True)
class Chip:
    """A device of a slice that is not there, with what JAX asks of it to lay out a mesh."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = 'cpu'
    device_kind: str = 'cpu'


TWO_SLICES = [Chip(i, slice_index=i % 2) for i in range(8)]


@pytest.mark.parametrize(
    ('config', 'sizes'),
    [
        (MeshConfig(slice=2), (2, 1, 4, 1)),
        (MeshConfig(slice=2, data=2, tensor=2, fsdp=1), (2, 2, 1, 2)),
        (MeshConfig(slice=-1, data=4, fsdp=1), (2, 4, 1, 1)),
    ],
)
def test_only_the_axis_of_slices_goes_from_slice_to_slice(config, sizes):
    made = mesh.make(config, TWO_SLICES)
    assert tuple(made.shape.values()) == sizes
    assert set(made.devices.flat) == set(TWO_SLICES)
    for number, part in enumerate(made.devices):
        assert {chip.slice_index for chip in part.flat} == {number}
    assert mesh.batch_shards(made) == 8 // sizes[3]


@pytest.mark.parametrize('slices', [4, 8])
def test_slices_that_are_not_there_are_refused(slices):
    with pytest.raises(UserError, match=r'form 2 slice\(s\); set --mesh.slice 2, or --mesh.data'):
        mesh.make(MeshConfig(slice=slices), TWO_SLICES)


def test_slices_of_tpus_have_an_axis_of_their_own_and_nodes_of_gpus_need_none():
    tpus = [replace(chip, platform='tpu') for chip in TWO_SLICES]
    with pytest.raises(UserError, match='form 2 slices.*; set --mesh.slice 2'):
        mesh.make(MeshConfig(), tpus)
    gpus = [replace(chip, platform='gpu') for chip in TWO_SLICES]
    assert mesh.make(MeshConfig(), gpus).shape['fsdp'] == 8


@pytest.mark.parametrize(
    ('config', 'named'),
    [
        (MeshConfig(tensor=3), 'tensor 3) does not fit 8 device(s)'),
        (MeshConfig(fsdp=4), 'fsdp 4, tensor 1) does not fit 8 device(s)'),
        (MeshConfig(tensor=16), 'does not fit 8 device(s)'),
        (MeshConfig(data=-1), 'at most one is -1'),
        (MeshConfig(tensor=0), 'sizes are positive'),
        (MeshConfig(tensor=-2), 'sizes are positive'),
        (MeshConfig(slice=2), 'slice 2'),
    ],
)
def test_mesh_that_does_not_fit_is_refused(config, named):
    with pytest.raises(UserError) as refused:
        mesh.make(config)
    assert named in str(refused.value)
    assert '\n' not in str(refused.value)

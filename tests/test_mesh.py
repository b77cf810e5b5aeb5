"""The mesh: sizes that fit, and one line for those that do not."""

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

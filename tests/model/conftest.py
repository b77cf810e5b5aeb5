"""Every test of the model runs on a mesh of one device, unless it sets another."""

import jax
import pytest

from llama_jax import mesh
from llama_jax.mesh import MeshConfig


@pytest.fixture(autouse=True)
def one_device():
    """The mesh in use: the first of the eight virtual devices."""
    one = mesh.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(one):
        yield one

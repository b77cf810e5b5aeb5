"""Vectors of texts against the plain forward pass."""

import functools

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate.embed import Embedder
from llama_jax.generate.programs import Programs
from llama_jax.model import layers
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of, weights


def embedder(n_devices=1, **axes):
    return Embedder(
        Programs(
            *(CONFIG, weights()),
            mesh=mesh_of(n_devices, **axes),
            compute=COMPUTE,
            end_ids=(),
            pad_id=0,
        )
    )


@functools.cache
def alone(length):
    """Oracle: one text without padding, pooled in numpy."""
    mesh = mesh_of()
    params = jax.device_put(weights(), jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        x_BTD, _ = layers.bind(CONFIG, params).features(
            np.asarray([prompt_of(length)]), compute=COMPUTE
        )
    mean = np.asarray(x_BTD, np.float64)[0].mean(axis=0)
    return mean / np.linalg.norm(mean)


LENGTHS = (30, 1, 17, 16, 5, 40, 2, 8, 9, 33)


@pytest.mark.parametrize('axes', [{}, {'data': 2, 'tensor': 2}])
def test_vectors_are_those_of_texts_alone(axes):
    made = embedder(8 if axes else 1, **axes)
    vectors = made([prompt_of(n) for n in LENGTHS])
    assert vectors.shape == (10, CONFIG.dim) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [alone(n) for n in LENGTHS], rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_bad_texts_are_named():
    made = embedder()
    with pytest.raises(UserError, match='text 1 is empty'):
        made([[1], []])
    with pytest.raises(UserError, match='text 0 has 257 tokens'):
        made([[1] * 257])

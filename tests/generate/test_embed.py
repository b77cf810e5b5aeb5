"""Vectors of texts against the plain forward pass."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate.embed import Embedder
from llama_jax.generate.programs import Programs
from llama_jax.model import layers
from llama_jax.model.config import Dynamic
from tests.generate.test_cached_architectures import weights
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of

BOTH = replace(CONFIG, layers=1, encoder_layers=2)


def embedder(n_devices=1, config=CONFIG, causal=True, **axes):
    return Embedder(
        Programs(
            *(config, weights(config)),
            mesh=mesh_of(n_devices, **axes),
            compute=COMPUTE,
            end_ids=(),
            pad_id=0,
            causal=causal,
        )
    )


@functools.cache
def alone(length, config=CONFIG, causal=True):
    """Oracle: one text without padding, pooled in numpy."""
    mesh = mesh_of()
    params = jax.device_put(weights(config), jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        x_BTD, _ = layers.bind(config, params).features(
            np.asarray([prompt_of(length)]), causal=causal, compute=COMPUTE
        )
    mean = np.asarray(x_BTD, np.float64)[0].mean(axis=0)
    return mean / np.linalg.norm(mean)


LENGTHS = (30, 1, 17, 16, 5, 40, 2, 8, 9, 33)


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{}, {'data': 2, 'tensor': 2}])
def test_vectors_are_those_of_texts_alone(axes):
    made = embedder(8 if axes else 1, **axes)
    vectors = made([prompt_of(n) for n in LENGTHS])
    assert vectors.shape == (10, CONFIG.dim) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [alone(n) for n in LENGTHS], rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.slow
def test_padding_adds_nothing_to_the_length_of_a_text():
    config = replace(CONFIG, rope_scaling=Dynamic(4.0, 24))
    vectors = embedder(config=config)([prompt_of(n) for n in (30, 20)])
    expected = [alone(n, config) for n in (30, 20)]
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(vectors[1], alone(20), rtol=0, atol=2e-6)  # within the context
    assert np.abs(vectors[0] - alone(30)).max() > 1e-3


def test_a_model_that_sees_all_of_a_text_reads_it_so():
    vectors = embedder(causal=False)([prompt_of(n) for n in (30, 5)])
    expected = [alone(n, causal=False) for n in (30, 5)]
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)
    assert np.abs(vectors[0] - alone(30)).max() > 1e-3


@pytest.mark.slow
def test_an_encoder_decoder_reads_with_its_encoder():
    lengths, params = (30, 1, 17), weights(BOTH)
    mesh = mesh_of()
    vectors = embedder(config=BOTH)([prompt_of(n) for n in lengths])
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    for n, vector in zip(lengths, vectors, strict=True):
        token_BT = np.asarray([prompt_of(n)])
        with jax.set_mesh(mesh):
            memory = layers.bind(BOTH, params).encode(
                token_BT, segment_BS=np.ones_like(token_BT), compute=COMPUTE
            )
        mean = np.asarray(memory.x_BSD, np.float64)[0].mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=0, atol=2e-6)


def test_bad_texts_are_named():
    made = embedder()
    with pytest.raises(UserError, match='text 1 is empty'):
        made([[1], []])
    with pytest.raises(UserError, match='text 0 has 257 tokens'):
        made([[1] * 257])

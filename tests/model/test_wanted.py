"""Leaving out places that nobody reads changes neither output nor gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout, mesh
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute
from llama_jax.model.patterns import Window
from llama_jax.model.wanted import Wanted
from tests.model import tiny

B, T = 8, 24


def wanted_places(per_row, seed=0):
    random = np.random.default_rng(seed)
    at_BT = np.zeros((B, T), bool)
    for row, n in zip(at_BT, per_row, strict=True):
        row[random.choice(T, n, replace=False)] = True
    return at_BT


def features_and_gradients(
    config, params, at_BT, most, *, compute=tiny.REFERENCE, key=None, **seen
):
    """Output where it is wanted, zeros elsewhere, and the gradients of a function of it."""
    token_BT = tiny.token_ids(B, T)
    weight_BTD = np.random.default_rng(1).standard_normal((B, T, config.dim)).astype(np.float32)

    def loss(params):
        x_BTD, _ = layers.bind(config, params).features(
            token_BT,
            compute=compute,
            key=key,
            **seen,
            wanted=None if most is None else Wanted(jnp.asarray(at_BT), most),
        )
        return jnp.sum(jnp.where(at_BT[:, :, None], jnp.sin(x_BTD) * weight_BTD, 0)), x_BTD

    (_, x_BTD), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.where(at_BT[:, :, None], x_BTD, 0), jax.device_get(gradients)


def assert_equal(found, expected, rounding=2e-6):
    """Up to the rounding of float32, of the largest entry of each array: sums run in another
    order."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rounding * np.abs(b).max()),
        found,
        expected,
    )


SEGMENT_BT = np.repeat([[1, 2, 3, 0]], [5, 9, 7, 3], axis=1) * np.ones((B, 1), np.int32)
PACKED = {
    'segment_BT': SEGMENT_BT,
    'position_BT': np.concatenate([np.arange(n) for n in (5, 9, 7, 3)])[None].repeat(B, 0),
}
PREFIX = np.tile([1, 1, 1, 0, 0, 0], 4)[None].repeat(B, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('changes', 'compute', 'seen'),
    [
        ({}, {}, {}),
        ({}, {'remat': 'full'}, {'causal': False, **PACKED}),
        ({}, {'remat': 'named', 'attention': 'auto'}, {'causal': False, **PACKED}),
        ({}, {'attention': 'auto'}, {'prefix_BT': PREFIX, **PACKED}),
        ({}, {'attention': 'blocked'}, {'prefix_BT': PREFIX, **PACKED}),
        ({'pattern': Window(4)}, {}, PACKED),
        ({'pattern': Window(4)}, {'attention': 'auto'}, {'causal': False}),
        (
            {'norm_place': 'post', 'mlp': 'gelu', 'norm': 'layernorm', 'bias': True},
            {'remat': 'dots'},
            {},
        ),
        ({'positions': 'learned'}, {}, {'place_BT': np.arange(T)[None].repeat(B, 0) // 2}),
        ({'layers': 1}, {}, {}),
        ({'dropout': 0.5}, {}, {}),
    ],
)
def test_equals_the_output_of_all_places(changes, compute, seen):
    config = dataclasses.replace(tiny.CONFIG, **changes)
    compute = dataclasses.replace(tiny.REFERENCE, **compute)
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    at_BT = wanted_places([0, 1, 2, 3, 4, 5, 5, 5])
    key = jax.random.key(3) if config.dropout else None
    with jax.set_mesh(devices):
        params = tiny.parameters(config, devices)
        how = {'compute': compute, 'key': key, **seen}
        expected = features_and_gradients(config, params, at_BT, None, **how)
        found = features_and_gradients(config, params, at_BT, 5, **how)
        assert_equal(found, expected)


@pytest.mark.slow
def test_layers_in_a_list_and_bfloat16():
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    at_BT = wanted_places([0, 1, 2, 3, 4, 5, 5, 5])
    half = dataclasses.replace(tiny.REFERENCE, precision='bfloat16')
    with jax.set_mesh(devices):
        params = layers.unstack(tiny.parameters(tiny.CONFIG, devices))
        for compute, rounding in ((tiny.REFERENCE, 2e-6), (half, 2e-2)):
            found, expected = (
                features_and_gradients(tiny.CONFIG, params, at_BT, most, compute=compute)
                for most in (5, None)
            )
            assert_equal(found[0], expected[0], rounding)
            if compute == tiny.REFERENCE:
                assert_equal(found, expected)


@pytest.mark.slow
def test_more_places_than_there_is_room_for_are_all_computed():
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    at_BT = wanted_places([0, 1, 2, 3, 4, 5, 9, 24])
    with jax.set_mesh(devices):
        params = tiny.parameters(tiny.CONFIG, devices)
        expected = features_and_gradients(tiny.CONFIG, params, at_BT, None)
        found = features_and_gradients(tiny.CONFIG, params, at_BT, 5)
        assert_equal(found, expected)


@pytest.mark.slow
def test_devices_give_the_same():
    at_BT = wanted_places([5, 1, 2, 3, 4, 0, 5, 5])
    results = []
    for shape in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        n = 1 if shape == MeshConfig() else 8
        devices = mesh.make(shape, jax.devices()[:n])
        with jax.set_mesh(devices):
            params = tiny.parameters(tiny.CONFIG, devices)
            results.append(features_and_gradients(tiny.CONFIG, params, at_BT, 5))
    assert_equal(*results, rounding=5e-6)  # matrices are cut in two, and rows in four


@pytest.mark.parametrize(('per_row', 'computed'), [([5] * B, 5), ([4] * 7 + [6], T)])
def test_wanted_places_alone_are_computed_while_they_fit(per_row, computed):
    """Each function tells of how many places of a row it is."""
    at_BT = wanted_places(per_row)
    with jax.set_mesh(mesh.make(MeshConfig(), jax.devices()[:1])):
        x_BTD = jax.reshard(jnp.ones((B, T, 4)), layout.act('BTD'))
        wanted = Wanted(jnp.asarray(at_BT), 5)
        found = wanted.of(x_BTD, lambda x: 5 * wanted.taken(x), lambda x: T * x)
    np.testing.assert_array_equal(found[:, :, 0], computed * at_BT)


def test_refused_where_every_place_is_read():
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(devices):
        model = layers.bind(tiny.CONFIG, layers.unstack(tiny.parameters(tiny.CONFIG, devices)))
        with pytest.raises(UserError, match='leave out `wanted`'):
            model.features(
                tiny.token_ids(1, 4),
                compute=Compute(),
                beside=[model.blocks[0]],
                wanted=Wanted(jnp.ones((1, 4), bool), 2),
            )

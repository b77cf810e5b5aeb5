"""Layer-wise rates and averaged parameters against what is written out here and against optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import layout, mesh
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.average import averaged
from llama_jax.optim.base import optimizer
from llama_jax.optim.depth import factors
from llama_jax.trees import named

MODEL = ModelConfig(vocab=16, dim=8, layers=3, heads=2, kv_heads=1, head_dim=4, ffn=16, context=8)


def test_each_layer_learns_more_slowly_than_the_one_above_it():
    both = dataclasses.replace(MODEL, encoder_layers=2, positions='learned')
    params = {**layers.abstract(both), 'objective': {'blocks': {'w_DF': jnp.ones((8, 16))}}}
    found = dict(named(factors(params, 0.5)))
    assert found.keys() == dict(named(params)).keys()
    for name, factor in found.items():
        got = np.ravel(factor).tolist()
        if name.startswith('blocks.'):
            assert got == [0.125, 0.25, 0.5], name
        elif name.startswith('encoder_blocks.'):
            assert got == [0.25, 0.5], name
        else:
            assert got == [0.0625 if name in ('embed_VD', 'position_CD') else 1.0], name


def test_layers_move_as_those_of_optimizers_with_their_own_rate():
    """One AdamW of optax for each layer, at its rate; weight decay is scaled with it."""
    rng = np.random.default_rng(0)
    shape = (3, 4, 5)
    start, grads = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    config = AdamW(layer_decay=0.8, clip=1e9, weight_decay=0.1)
    tx, plain = optimizer(config), optimizer(dataclasses.replace(config, layer_decay=1.0))
    params = {'blocks': {'mlp': {'down_FD': jnp.asarray(start)}}}
    state, other = tx.init(params), plain.init(params)
    jax.tree.map(np.testing.assert_array_equal, state, other)  # a run may change it
    wanted = start.copy()
    alone = [optax.adamw(0.01 * 0.8 ** (3 - i), 0.9, 0.95, weight_decay=0.1) for i in range(3)]
    states = [a.init(jnp.asarray(start[i])) for i, a in enumerate(alone)]
    for _ in range(3):
        directions, state = tx.update({'blocks': {'mlp': {'down_FD': grads}}}, state, params)
        params = jax.tree.map(lambda p, d: p - 0.01 * d, params, directions)
        for i, a in enumerate(alone):
            update, states[i] = a.update(jnp.asarray(grads[i]), states[i], jnp.asarray(wanted[i]))
            wanted[i] += update
    np.testing.assert_allclose(params['blocks']['mlp']['down_FD'], wanted, rtol=1e-5, atol=1e-7)


def test_the_average_is_the_formula_s_and_optax_s():
    rng = np.random.default_rng(0)
    each = rng.normal(size=(30, 4)).astype(np.float32)
    average, by_optax, wanted = each[0], each[0], each[0].astype(np.float64)
    for taken, params in enumerate(each):
        decay = min(0.7, (1 + taken) / (10 + taken))
        wanted = decay * wanted + (1 - decay) * params
        average = averaged(average, params, decay=0.7, taken=jnp.int32(taken))
        by_optax = optax.incremental_update(params, by_optax, 1 - decay)
    assert (1 + 29) / (10 + 29) > 0.7 > 1 / 10  # both decays were at work
    np.testing.assert_allclose(average, wanted, rtol=1e-5)
    np.testing.assert_allclose(by_optax, wanted, rtol=1e-5)


@pytest.mark.slow
def test_the_rates_are_those_of_one_device_on_a_mesh():
    config, devices = AdamW(layer_decay=0.5), mesh.make(MeshConfig(fsdp=4, tensor=2))
    tx, params = optimizer(config), layers.split(layers.Transformer(MODEL, key=jax.random.key(0)))
    wanted, _ = jax.jit(tx.update)(params, tx.init(params), params)
    placed = jax.tree.map(jax.device_put, params, layout.shardings(params, devices))
    with jax.set_mesh(devices):
        got, _ = jax.jit(tx.update)(placed, jax.jit(tx.init)(placed), placed)
    for (name, x), (_, y) in zip(named(got), named(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)

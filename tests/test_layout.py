"""The letter table: where arrays lie, and that the placement changes no result."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import layout, mesh, trees
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from tests.model import tiny

CONFIG = replace(tiny.CONFIG, dropout=0.2)
MESHES = {
    'fsdp 8': MeshConfig(fsdp=8),
    'tensor 2 x fsdp 4': MeshConfig(tensor=2, fsdp=4),
    'data 2 x fsdp 2 x tensor 2': MeshConfig(data=2, fsdp=2, tensor=2),
}


def test_table_is_written_out():
    batch = ('slice', 'data', 'fsdp')
    assert layout.param('DNH') == P('fsdp', 'tensor', None)
    assert layout.param('LNHD') == P(None, 'tensor', None, 'fsdp')
    assert layout.param('VD') == P('tensor', 'fsdp')
    assert layout.param('FD') == P('tensor', 'fsdp')
    assert layout.param('D') == P(None)
    assert layout.param('LD') == P(None, None)
    assert layout.act('BTD') == P(batch, None, None)
    assert layout.act('BTNH') == P(batch, None, 'tensor', None)
    assert layout.act('BTF') == P(batch, None, 'tensor')
    assert layout.act('DNH') == P(None, 'tensor', None)
    assert layout.rows() == P(batch)


def test_letters_end_a_name():
    assert layout.letters_of('blocks.attention.q_DNH', 3) == 'DNH'
    assert layout.letters_of('blocks.attention.q_DNH', 4) == 'LDNH'
    assert layout.letters_of('norm.scale_D', 1) == 'D'


@pytest.mark.parametrize(('name', 'ndim'), [('q_DNH', 2), ('q_DNH', 5), ('blocks.bias', 1)])
def test_name_without_its_letters_is_an_error(name, ndim):
    with pytest.raises(ValueError, match=f'{name}.*{ndim} dimensions'):
        layout.letters_of(name, ndim)


def test_optimizer_state_lies_as_its_parameters():
    on = mesh.make(MeshConfig(tensor=2))
    params = layers.abstract(CONFIG)
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    expected = dict(trees.named(layout.shardings(params, on)))
    for name, sharding in trees.named(layout.shardings(state, on)):
        _, _, rest = name.partition('u.')  # 0.mu.blocks..., 0.nu.blocks..., 0.count
        assert sharding == (expected[rest] if rest else NamedSharding(on, P())), name


@pytest.mark.parametrize(
    ('sizes', 'named'),
    [
        ({'D': 34}, 'the model dimension (34) does not divide over the 4 shards'),
        ({'K': 1}, 'the number of key-value heads (1) does not divide over the 2 shards'),
        ({'V': 63}, 'the vocabulary (63)'),
        ({'F': 7}, 'the hidden dimension of the feed-forward layer (7)'),
        ({'B': 6}, 'the batch (6) does not divide over the 4 shards'),
    ],
)
def test_size_that_does_not_divide_is_refused(sizes, named):
    on = mesh.make(MeshConfig(tensor=2, fsdp=4))
    layout.check({**CONFIG.sizes(), 'B': 8}, on)
    with pytest.raises(UserError) as refused:
        layout.check({**CONFIG.sizes(), 'B': 8, **sizes}, on)
    assert named in str(refused.value)


def test_parameters_are_created_in_their_places():
    # That none is whole on the way there is tested with the training state.
    on = mesh.make(MeshConfig(tensor=2, fsdp=4))
    params = layers.create(CONFIG, jax.random.key(0), on)
    held = dict.fromkeys(on.devices.flat, 0)
    for name, leaf in trees.named(params):
        assert leaf.sharding.spec == layout.param(layout.letters_of(name, leaf.ndim)), name
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    whole = trees.n_bytes(params)
    vectors = sum(x.nbytes for x in jax.tree.leaves(params) if x.ndim < 3 and x.size < 100)
    assert set(held.values()) == {(whole - vectors) // 8 + vectors}


@functools.cache
def loss_and_gradients(config):
    """Of the same parameters, tokens and dropout on the mesh of `config` (None: one device)."""
    on = mesh.make(MeshConfig(), jax.devices()[:1]) if config is None else mesh.make(config)
    with jax.set_mesh(on):
        params = tiny.parameters(CONFIG, on)
        token_BT = jax.device_put(tiny.token_ids(8, 16), NamedSharding(on, layout.rows()))
        compute = replace(tiny.REFERENCE, remat='dots')
        loss = functools.partial(tiny.loss, CONFIG, compute=compute, key=jax.random.key(5))
        value, gradients = jax.jit(jax.value_and_grad(loss))(params, token_BT)
    return value, gradients, params


@pytest.mark.slow
@pytest.mark.parametrize('name', MESHES)
def test_sharded_loss_and_gradients_equal_single_device(name):
    expected_loss, expected, _ = loss_and_gradients(None)
    loss, gradients, params = loss_and_gradients(MESHES[name])
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for (path, found), leaf in zip(trees.named(gradients), jax.tree.leaves(expected), strict=True):
        atol = 1e-5 * np.abs(leaf).max()
        np.testing.assert_allclose(found, leaf, rtol=0, atol=atol, err_msg=path)
    for gradient, param in zip(jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True):
        assert gradient.sharding == param.sharding


def test_gather_brings_a_parameter_together_over_fsdp_only():
    on = mesh.make(MeshConfig(tensor=2, fsdp=4))
    with jax.set_mesh(on):
        w_DNH = jnp.zeros((8, 4, 2), out_sharding=layout.param('DNH'))
        together = jax.jit(lambda w: layout.gather(w, 'DNH'))(w_DNH)
        assert w_DNH.addressable_shards[0].data.shape == (2, 2, 2)
        assert together.addressable_shards[0].data.shape == (8, 2, 2)


def test_parameters_that_do_not_divide_are_named():
    devices = mesh.make(MeshConfig(tensor=2))
    layout.check_params({'a_DNH': jnp.ones((4, 2, 3)), 'scale': jnp.ones(())}, devices)
    with pytest.raises(UserError, match=r'generator.a_DNH \[4, 3, 3\].*2 shards.*--mesh.tensor'):
        layout.check_params({'generator': {'a_DNH': jnp.ones((4, 3, 3))}}, devices)

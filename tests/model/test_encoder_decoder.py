"""Encoder-decoders: who sees what, and the same result scanned, apart, recomputed and sharded.

Equality with PyTorch's nn.Transformer is in tests/parity."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout, mesh, trees
from llama_jax.mesh import MeshConfig
from llama_jax.model import block, layers, transformer
from tests.model import tiny

T = 24
CLASSIC = replace(
    tiny.CONFIG,
    norm='layer',
    norm_place='post',
    mlp='relu',
    bias=True,
    positions='learned',
    encoder_layers=3,
)
LLAMA = replace(tiny.CONFIG, encoder_layers=2)
SEGMENT_T = np.repeat([1, 2, 0], [9, 10, 5])


def both(config, params, token_BS, token_BT, *, compute=tiny.REFERENCE, key=None, **context):
    """Logits of an encoder-decoder."""
    model = layers.bind(config, params)
    keys = (None, None) if key is None else jax.random.split(key)
    memory = model.encode(
        token_BS, segment_BS=context.get('segment_BS'), compute=compute, key=keys[0]
    )
    return model(
        *(token_BT,),
        segment_BT=context.get('segment_BT'),
        memory=memory,
        compute=compute,
        key=keys[1],
    )[0]


@functools.cache
def sequences():
    return np.asarray(tiny.token_ids(8, T)), np.asarray(tiny.token_ids(8, T - 8, seed=1))


def test_decoder_sees_the_memory_of_its_segment_alone(one_device):
    params = tiny.parameters(LLAMA, one_device)
    (token_BS, token_BT), segment_T = sequences(), np.repeat([1, 2, 0], [6, 8, 2])
    token_BS, token_BT = jnp.asarray(token_BS[:1]), jnp.asarray(token_BT[:1])
    logits = jax.jit(
        functools.partial(
            both, LLAMA, params, segment_BS=SEGMENT_T[None], segment_BT=segment_T[None]
        )
    )
    before_TV = np.asarray(logits(token_BS, token_BT)[0])
    assert np.isfinite(before_TV).all()
    for changed in (3, 12):  # of the encoder: both directions within a document
        new_BS = token_BS.at[0, changed].set((token_BS[0, changed] + 1) % LLAMA.vocab)
        moved = (np.asarray(logits(new_BS, token_BT)[0]) != before_TV).any(axis=-1)
        same = segment_T == SEGMENT_T[changed]
        np.testing.assert_array_equal(moved[segment_T > 0], same[segment_T > 0])
    changed = 8  # of the decoder: causal
    new_BT = token_BT.at[0, changed].set((token_BT[0, changed] + 1) % LLAMA.vocab)
    moved = (np.asarray(logits(token_BS, new_BT)[0]) != before_TV).any(axis=-1)
    np.testing.assert_array_equal(moved, (segment_T == 2) & (np.arange(T - 8) >= changed))


def loss(params, token_BS, token_BT, *, remat='none'):
    """Of the classic encoder-decoder."""
    compute = replace(tiny.REFERENCE, remat=remat)
    logits_BTV = both(CLASSIC, params, token_BS, token_BT, compute=compute)
    return jnp.mean(jnp.square(jax.nn.log_softmax(logits_BTV)))


@functools.cache
def loss_and_gradients(shape=None, remat='none'):
    on = mesh.make(MeshConfig(), jax.devices()[:1]) if shape is None else mesh.make(shape)
    with jax.set_mesh(on):
        rows = jax.NamedSharding(on, layout.rows())
        placed = (jax.device_put(x, rows) for x in sequences())
        run = jax.jit(jax.value_and_grad(functools.partial(loss, remat=remat)))
        return run(tiny.parameters(CLASSIC, on), *placed)


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    named = trees.named(expected[1])
    largest = max(np.abs(leaf).max() for _, leaf in named)
    for one, (path, leaf) in zip(jax.tree.leaves(found[1]), named, strict=True):
        np.testing.assert_allclose(one, leaf, rtol=0, atol=1e-5 * largest, err_msg=path)


@pytest.mark.slow
def test_every_parameter_of_an_encoder_decoder_has_a_part_in_the_loss():
    _, gradients = loss_and_gradients()
    for path, leaf in trees.named(gradients):
        # A bias of keys adds one number to all scores of a query, which the softmax takes away.
        assert np.abs(leaf).max() > 1e-6 or 'k_bias' in path, path


@pytest.mark.slow
def test_sharded_encoder_decoder_equals_single_device():
    assert_same(loss_and_gradients(MeshConfig(data=2, fsdp=2, tensor=2)), loss_and_gradients())


@pytest.mark.slow
def test_recomputed_encoder_decoder_equals_kept():
    assert_same(loss_and_gradients(remat='full'), loss_and_gradients())


def test_encoder_decoder_of_layers_apart_equals_scanned(one_device):
    params = tiny.parameters(CLASSIC, one_device)
    apart = layers.unstack(params)
    assert [len(apart[name]) for name in ('encoder_blocks', 'blocks')] == [3, 2]
    jax.tree.map(np.testing.assert_array_equal, layers.stack(apart), params)
    np.testing.assert_allclose(
        jax.jit(loss)(apart, *sequences()), loss_and_gradients()[0], rtol=1e-6
    )


def test_embeddings_and_every_sublayer_drop_with_a_key_of_their_own(one_device, monkeypatch):
    used = []

    def record(x_BTD, rate, key):
        used.append(jax.random.key_data(key))
        return x_BTD

    def keys(params):
        both(CLASSIC, params, *sequences(), key=jax.random.key(0))
        return used

    monkeypatch.setattr(block, 'drop', record)
    monkeypatch.setattr(transformer, 'drop', record)
    apart = layers.unstack(tiny.parameters(CLASSIC, one_device))
    found = [tuple(key.tolist()) for key in jax.jit(keys)(apart)]
    assert len(found) == len(set(found)) == 2 + 2 * CLASSIC.encoder_layers + 3 * CLASSIC.layers

"""Chunked cross-entropy over a sharded vocabulary against an unchunked one in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax import layout, mesh
from llama_jax.mesh import MeshConfig
from llama_jax.objectives import softmax
from llama_jax.objectives.softmax import cross_entropy

MESHES = {
    'one device': (1, MeshConfig()),
    'fsdp 8': (8, MeshConfig()),
    'tensor 8': (8, MeshConfig(fsdp=1, tensor=8)),
    'fsdp 4 tensor 2': (8, MeshConfig(fsdp=4, tensor=2)),
    'data 2 fsdp 2 tensor 2': (8, MeshConfig(data=2, fsdp=2, tensor=2)),
}


def make_mesh(name):
    n_devices, config = MESHES[name]
    return mesh.make(config, jax.devices()[:n_devices])


def inputs(B=8, T=5, D=16, V=104, dtype=np.float32):
    """Features, head, targets and uneven weights, some of them zero."""
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(B, T, D)).astype(dtype)
    head_VD = rng.normal(size=(V, D)).astype(np.float32)
    target_BT = rng.integers(0, V, (B, T)).astype(np.int32)
    target_BT[0, :2] = 0, V - 1
    weight_BT = rng.choice([0, 0.25, 1, 3], (B, T)).astype(np.float32)
    return x_BTD, head_VD, target_BT, weight_BT


def oracle(x_BTD, head_VD, target_BT, weight_BT, z_loss, never_BT=None):
    """total, nll, correct, d total / d x, d total / d head: whole logits, float64."""
    x_BTD, head_VD = x_BTD.astype(np.float64), head_VD.astype(np.float64)
    logit_BTV = x_BTD @ head_VD.T
    if never_BT is not None:
        np.put_along_axis(logit_BTV, never_BT[..., None], -1e30, axis=-1)
    log_z_BT = np.log(np.exp(logit_BTV).sum(-1))
    one_hot_BTV = np.eye(head_VD.shape[0])[target_BT]
    nll_BT = log_z_BT - (logit_BTV * one_hot_BTV).sum(-1)
    correct_BT = logit_BTV.argmax(-1) == target_BT
    total = (weight_BT * (nll_BT + z_loss * log_z_BT**2)).sum()
    probability_BTV = np.exp(logit_BTV - log_z_BT[..., None])
    dlogit_BTV = weight_BT[..., None] * (
        probability_BTV * (1 + 2 * z_loss * log_z_BT[..., None]) - one_hot_BTV
    )
    return (
        *(total, (weight_BT * nll_BT).sum(), (weight_BT * correct_BT).sum()),
        dlogit_BTV @ head_VD,
        np.einsum('BTV,BTD->VD', dlogit_BTV, x_BTD),
    )


def placed(arrays, devices):
    """Features, head, targets and weights as a training step has them."""
    specs = layout.act('BTD'), layout.param('VD'), *[layout.act('BT')] * (len(arrays) - 2)
    return [
        jax.device_put(array, NamedSharding(devices, spec))
        for array, spec in zip(arrays, specs, strict=True)
    ]


def compute(arrays, devices, z_loss):
    """Sums of the evaluation path; sums and gradients of the training path."""
    arrays = placed(arrays, devices)

    def loss(*args):
        return cross_entropy(*args[:4], z_loss, 0, *args[4:])

    with jax.set_mesh(devices):
        sums = jax.jit(loss)(*arrays)
        gradient = jax.value_and_grad(
            lambda *args: (lambda s: (s.total, s))(loss(*args)),
            argnums=(0, 1),
            has_aux=True,
        )
        (_, trained), (dx_BTD, dhead_VD) = jax.jit(gradient)(*arrays)
    assert dx_BTD.sharding == arrays[0].sharding and dhead_VD.sharding == arrays[1].sharding
    return sums, trained, np.asarray(dx_BTD), np.asarray(dhead_VD)


def assert_near(got, wanted, relative):
    error = np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < relative


@pytest.mark.parametrize('name', MESHES)
def test_equals_the_unchunked_loss_in_float64(name, monkeypatch):
    # 40 tokens by 7 leave padding in the last chunk; 5 tokens of a device are less than a chunk.
    monkeypatch.setattr(softmax, 'CHUNK_TOKENS', 7)
    arrays = inputs()
    *wanted, dx_BTD, dhead_VD = oracle(*arrays, 0.1)
    sums, trained, got_dx, got_dhead = compute(arrays, make_mesh(name), 0.1)
    np.testing.assert_allclose(sums, wanted, rtol=2e-6)
    np.testing.assert_array_equal(sums, trained)
    assert_near(got_dx, dx_BTD, 1e-6)
    assert_near(got_dhead, dhead_VD, 1e-6)


@pytest.mark.parametrize('name', ['one device', 'data 2 fsdp 2 tensor 2'])
def test_only_tokens_that_bear_loss_are_computed(name, monkeypatch):
    """One device has many of them and others none; what the rest holds is never looked at."""
    monkeypatch.setattr(softmax, 'CHUNK_TOKENS', 7)
    x_BTD, head_VD, target_BT, weight_BT = inputs()
    weight_BT[:] = 0
    weight_BT[3], weight_BT[2, 4], weight_BT[6, 1] = [3, 1, 0.25, 1, 2], 1, -0.5
    never_BT = (target_BT + 1 + np.arange(5)) % 104
    arrays = x_BTD, head_VD, target_BT, weight_BT
    *wanted, dx_BTD, dhead_VD = oracle(*arrays, 0.1, never_BT)
    x_BTD[weight_BT == 0] = np.nan
    sums, trained, got_dx, got_dhead = compute((*arrays, never_BT), make_mesh(name), 0.1)
    np.testing.assert_allclose(sums, wanted, rtol=2e-6)
    np.testing.assert_array_equal(sums, trained)
    assert_near(got_dx, dx_BTD, 1e-6)
    assert_near(got_dhead, dhead_VD, 1e-6)
    assert not got_dx[weight_BT == 0].any()


def test_chunks_are_as_many_as_the_device_with_most_needs(monkeypatch):
    monkeypatch.setattr(softmax, 'CHUNK_TOKENS', 4)
    weight_BT = np.zeros((8, 12), np.float32)
    weight_BT[5, 2:12] = weight_BT[4, :3] = 1  # on one of four devices: 13 tokens of 24
    devices = make_mesh('fsdp 4 tensor 2')

    @jax.shard_map(in_specs=layout.act('BT'), out_specs=jax.P(), mesh=devices)
    def n(weight_BT):
        return softmax.Gathered.of(weight_BT).n

    with jax.set_mesh(devices):
        (weight_BT,) = placed([None, None, weight_BT], devices)[2:]
        assert jax.jit(n)(weight_BT) == 4


@pytest.mark.parametrize(
    'shape, z_loss', [((1, 2, 8, 3), 0.0), ((3, 7, 8, 101), 0.0), ((2, 16, 8, 33), 1e-4)]
)
def test_any_number_of_tokens_and_any_vocabulary(shape, z_loss, monkeypatch):
    monkeypatch.setattr(softmax, 'CHUNK_TOKENS', 8)
    arrays = inputs(*shape)
    *wanted, dx_BTD, dhead_VD = oracle(*arrays, z_loss)
    sums, _, got_dx, got_dhead = compute(arrays, make_mesh('one device'), z_loss)
    np.testing.assert_allclose(sums, wanted, rtol=2e-6)
    assert_near(got_dx, dx_BTD, 1e-6)
    assert_near(got_dhead, dhead_VD, 1e-6)


def test_large_logits_do_not_overflow():
    x_BTD, head_VD, target_BT, weight_BT = inputs()
    arrays = x_BTD * 300, head_VD, target_BT, weight_BT
    sums, _, dx_BTD, dhead_VD = compute(arrays, make_mesh('fsdp 4 tensor 2'), 1e-4)
    assert np.isfinite(sums).all() and np.isfinite(dx_BTD).all() and np.isfinite(dhead_VD).all()


def test_bfloat16_features_are_summed_in_float32():
    arrays = inputs(dtype=jnp.bfloat16)
    rounded = arrays[1].astype(jnp.bfloat16).astype(np.float32)
    *wanted, dx_BTD, dhead_VD = oracle(arrays[0], rounded, *arrays[2:], 1e-4)
    sums, _, got_dx, got_dhead = compute(arrays, make_mesh('fsdp 4 tensor 2'), 1e-4)
    assert sums.total.dtype == got_dhead.dtype == np.float32 and got_dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(sums, wanted, rtol=1e-5)
    assert_near(got_dx, dx_BTD, 2**-7)
    assert_near(got_dhead, dhead_VD, 2**-7)


def test_the_loss_scales_its_gradient():
    devices = make_mesh('one device')
    with jax.set_mesh(devices):
        x_BTD, *rest = placed(inputs(), devices)

        @jax.jit
        def gradient(scale):
            return jax.grad(lambda x: scale * cross_entropy(x, *rest, 0.1).total)(x_BTD)

        np.testing.assert_allclose(gradient(-3.0), -3.0 * gradient(1.0), rtol=1e-6)


def temporary_bytes(loss, B, T, D, V):
    """Memory of compiled loss and gradients besides arguments and results. Nothing runs."""
    devices = make_mesh('one device')

    def abstract(letters, shape, dtype, place):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, place(letters)))

    arguments = (
        abstract('BTD', (B, T, D), jnp.float32, layout.act),
        abstract('VD', (V, D), jnp.float32, layout.param),
        abstract('BT', (B, T), jnp.int32, layout.act),
        abstract('BT', (B, T), jnp.float32, layout.act),
    )
    with jax.set_mesh(devices):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def whole(x_BTD, head_VD, target_BT, weight_BT):
    """What everybody writes first."""
    logit_BTV = jnp.einsum('BTD,VD->BTV', x_BTD, layout.gather(head_VD, 'VD'))
    one_hot_BTV = jax.nn.one_hot(target_BT, head_VD.shape[0])
    nll_BT = jax.nn.logsumexp(logit_BTV, -1) - jnp.sum(logit_BTV * one_hot_BTV, -1)
    return jnp.sum(weight_BT * nll_BT)


def test_the_logits_of_a_large_vocabulary_are_never_whole_in_memory():
    B, D, V = 8, 64, 128256

    def chunked(*args):
        return cross_entropy(*args, 1e-4).total

    logits = 4 * B * 2048 * V
    assert temporary_bytes(whole, B, 2048, D, V) > logits
    used = temporary_bytes(chunked, B, 2048, D, V)
    assert used < logits / 8
    # More tokens need no more memory, apart from their features and gradients.
    assert temporary_bytes(chunked, B, 4096, D, V) - used < 4 * 4 * B * 2048 * D

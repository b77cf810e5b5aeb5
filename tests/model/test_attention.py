"""Attention backends: one result, one contract, and a refusal for what they cannot honour."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout, mesh
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import kernels
from llama_jax.model.attention import Attention
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import BlockGlobal, Dilated, Window
from llama_jax.model.rope import rotation_of
from tests.model import tiny

B, T, N, K, H = 4, 128, 4, 2, 8
LETTERS = ('BTNH', 'BSKH', 'BSKH', 'BTNH')


@functools.cache
def inputs():
    """Queries, keys, values, the gradient of the output, and segments: packed rows and padding."""
    random = np.random.default_rng(0)
    q_BTNH, k_BSKH, v_BSKH, g_BTNH = (
        random.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N)
    )
    segment_BT = np.ones((B, T), np.int32)
    segment_BT[1, 50:], segment_BT[1, 51:], segment_BT[1, 100:] = 2, 3, 0
    segment_BT[2, 3:] = 2
    segment_BT[3] = 0  # a row of padding alone
    return (q_BTNH * 2, k_BSKH, v_BSKH, g_BTNH), segment_BT


@functools.cache
def by_loops():
    """Output and gradients of (output * g).sum() in float64: one query at a time, no mask."""
    (q_BTNH, k_BSKH, v_BSKH, g_BTNH), segment_BT = inputs()
    q_BTNH, k_BSKH, v_BSKH, g_BTNH = (
        x.astype(np.float64) for x in (q_BTNH, k_BSKH, v_BSKH, g_BTNH)
    )
    out, dq, dk, dv = (np.zeros_like(x) for x in (q_BTNH, q_BTNH, k_BSKH, v_BSKH))
    for b, t, n in np.ndindex(B, T, N):
        k = n // (N // K)
        seen = [s for s in range(t + 1) if segment_BT[b, s] == segment_BT[b, t]]
        keys, values, g = k_BSKH[b, seen, k], v_BSKH[b, seen, k], g_BTNH[b, t, n]
        weight = np.exp(keys @ q_BTNH[b, t, n] / H**0.5)
        weight /= weight.sum()
        out[b, t, n] = weight @ values
        dweight = values @ g
        dscore = weight * (dweight - weight @ dweight) / H**0.5
        dq[b, t, n] = dscore @ keys
        dk[b, seen, k] += np.outer(dscore, q_BTNH[b, t, n])
        dv[b, seen, k] += np.outer(weight, g)
    return out, dq, dk, dv


def by_backend(backend, on):
    """Output and gradients of `attend` on the mesh `on`."""
    arrays, segment_BT = inputs()

    def weighted(q_BTNH, k_BSKH, v_BSKH, g_BTNH, segment_BT):
        out_BTNH = kernels.attend(
            *(q_BTNH, k_BSKH, v_BSKH),
            visible=Visibility(segment_BT, segment_BT),
            backend=backend,
        )
        return (out_BTNH * g_BTNH).sum(), out_BTNH

    with jax.set_mesh(on):
        placed = [
            jax.device_put(x, jax.NamedSharding(on, layout.act(letters)))
            for x, letters in zip((*arrays, segment_BT), (*LETTERS, 'BT'), strict=True)
        ]
        gradient = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
        (_, out_BTNH), gradients = gradient(*placed)
    assert out_BTNH.sharding.spec == layout.act('BTNH')
    return out_BTNH, *gradients


@pytest.mark.parametrize('backend', ['reference', 'blocked', 'xla', 'splash'])
def test_backend_equals_loops_in_float64(backend, one_device):
    found = by_backend(backend, one_device)
    for array, expected in zip(found, by_loops(), strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('backend', ['reference', 'blocked', 'xla', 'splash'])
def test_backend_divides_over_rows_and_heads(backend):
    # splash is run by each device on its own rows and heads.
    found = by_backend(backend, mesh.make(MeshConfig(data=2, fsdp=2, tensor=2)))
    for array, expected in zip(found, by_loops(), strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5)


def attend(backend, *, queries=T, keys=T, dtype=jnp.float32):
    q_BTNH = jnp.zeros((1, queries, N, H), dtype, out_sharding=layout.act('BTNH'))
    k_BSKH = jnp.zeros((1, keys, K, H), dtype, out_sharding=layout.act('BSKH'))
    visible = Visibility(jnp.ones((1, queries)), jnp.ones((1, keys)))
    return kernels.attend(q_BTNH, k_BSKH, k_BSKH, visible=visible, backend=backend)


@pytest.mark.parametrize(
    ('backend', 'sizes', 'named'),
    [
        ('cudnn', {}, 'this device is no GPU'),
        ('splash', {'queries': 100, 'keys': 100}, 'multiples of 128, not 100'),
        ('splash', {'queries': 128, 'keys': 256}, 'not 128 queries over 256 keys'),
        ('blocked', {'queries': 128, 'keys': 256}, 'not 128 queries over 256 keys'),
    ],
)
def test_backend_refuses_what_it_cannot_honour(backend, sizes, named):
    with pytest.raises(UserError) as refused:
        attend(backend, **sizes)
    message = str(refused.value)
    assert named in message and repr(backend) in message and 'use auto' in message


def seen(T=256, S=256, **rest):
    return Visibility(np.ones((1, T), np.int32), np.ones((1, S), np.int32), **rest)


@pytest.mark.parametrize(
    ('sizes', 'H', 'dtype', 'named'),
    [
        ({}, 64, 'float32', 'bfloat16, not float32'),
        ({}, 256, 'bfloat16', 'not 256'),
        ({}, 12, 'bfloat16', 'not 12'),
        ({'T': 127, 'S': 127}, 64, 'bfloat16', 'not 127 queries'),
        ({'T': 1, 'S': 128}, 64, 'bfloat16', 'not 1 queries over 128'),
    ],
)
def test_cudnn_is_not_chosen_where_it_would_fail(sizes, H, dtype, named):
    plain = 'reference' if sizes.get('T') == 1 else 'blocked'
    assert kernels._choose('gpu', seen(**sizes), H, dtype) == plain
    assert named in kernels._problem('cudnn', 'gpu', seen(**sizes), H, dtype)


def test_auto_chooses_by_device_shape_and_what_is_seen():
    prefix_BS = np.ones((1, 256), np.int32)
    wanted = [
        ('gpu', seen(), 'cudnn'),
        ('tpu', seen(), 'splash'),
        ('tpu', seen(T=1), 'reference'),
        ('cpu', seen(), 'blocked'),
        ('cpu', seen(T=1), 'reference'),
        ('tpu', seen(causal=False), 'splash'),
        ('tpu', seen(T=128, causal=False), 'splash'),
        ('gpu', seen(T=128, causal=False), 'cudnn'),
        ('cpu', seen(T=128, causal=False), 'blocked'),
        ('tpu', seen(T=100, causal=False), 'blocked'),
        ('tpu', seen(prefix_BS=prefix_BS), 'blocked'),
        ('gpu', seen(prefix_BS=prefix_BS), 'cudnn'),
        ('tpu', seen(pattern=Window(9)), 'splash'),
        ('tpu', seen(pattern=BlockGlobal(9)), 'splash'),
        ('cpu', seen(pattern=Window(9)), 'blocked'),
        ('gpu', seen(pattern=Window(9)), 'blocked'),  # a mask would cost the whole of it
        ('gpu', seen(pattern=Window(9), whole=True), 'cudnn'),
        ('gpu', seen(pattern=Window(9), whole=True, causal=False), 'blocked'),
        ('gpu', seen(pattern=Dilated(9, 2), whole=True), 'blocked'),
        ('tpu', seen(pattern=Window(9), key_place_BS=np.zeros((1, 256), np.int32)), 'reference'),
    ]
    for platform, visible, backend in wanted:
        found = kernels._choose(platform, visible, 128, 'bfloat16')
        assert found == backend, (platform, visible.pattern, visible.causal, found)
    assert 'no TPU' in kernels._problem('splash', 'gpu', seen(), 128, 'bfloat16')


def test_choice_is_logged_once(caplog):
    kernels._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger='llama_jax.model.kernels'):
        attend('auto')
        attend('auto')
        attend('xla')
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        'attention: backend blocked on cpu, 128 queries over 128 keys',
        'attention: backend xla on cpu, 128 queries over 128 keys',
    ]


@pytest.mark.parametrize('rotated', [True, False])
def test_a_memory_is_rotated_by_its_own_positions(rotated):
    """The row itself as its memory is self-attention; and rotations of the memory tell."""
    with jax.set_mesh(mesh.make(MeshConfig(), jax.devices()[:1])):
        attention = Attention(tiny.CONFIG, sublayers=1, key=jax.random.key(0))
        position_BT = jnp.arange(6)[None]
        x_BTD = jax.random.normal(jax.random.key(1), (1, 6, tiny.CONFIG.dim))
        x_BTD = jax.reshard(x_BTD, layout.act('BTD'))
        rope = rotation_of(tiny.CONFIG, position_BT)
        how = {
            'rope': rope,
            'visible': Visibility(jnp.ones((1, 6), int), jnp.ones((1, 6), int), causal=False),
            'compute': tiny.REFERENCE,
        }
        own, _ = attention(x_BTD, **how)
        read, _ = attention(x_BTD, memory=x_BTD, memory_rope=rope if rotated else None, **how)
    assert np.allclose(own, read, atol=1e-6) == rotated

"""What a query sees: patterns, prefix and causality against loops, and blocks against the whole
mask. Other backends are in test_backends.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout, mesh
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import kernels, patterns
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import BlockGlobal, Dense, Dilated, Window

PATTERNS = {
    'dense': Dense(),
    'window': Window(9),
    'window of one': Window(1),
    'window wider than a chunk': Window(70),
    'dilated': Dilated(5, 3),
    'blocks': BlockGlobal(24),
    'blocks and global': BlockGlobal(32, 5),
    'more global than a block': BlockGlobal(4, 11),
}
VISIBILITIES = ('causal', 'full', 'prefix')
B, N, K, H = 2, 4, 2, 8
LETTERS = ('BTNH', 'BSKH', 'BSKH', 'BTNH')


def by_hand(pattern, query, key):
    """The definitions, one pair of places at a time."""
    match pattern:
        case Window(size):
            return key in range(query - size + 1, query + size)
        case Dilated(size, dilation):
            near = [i * dilation for i in range(size)]
            return query - key in near or key - query in near
        case BlockGlobal(block, n_global):
            start = query - query % block
            return key in range(start, start + block) or min(query, key) < n_global
    return True


def segments(T):
    """A row of one document, and a row of two documents and padding."""
    segment_BT = np.ones((B, T), np.int32)
    segment_BT[1, T // 3 :], segment_BT[1, T - 7 :] = 2, 0
    return segment_BT


def prefixes(T):
    """Of both documents of the second row, and more of the first row than a block."""
    prefix_BT = np.zeros((B, T), np.int32)
    prefix_BT[0, : T // 2], prefix_BT[1, :11], prefix_BT[1, T // 3 : T // 3 + 20] = 1, 1, 1
    return prefix_BT


def visibility(pattern, kind, T, segment_BT=None):
    segment_BT = segments(T) if segment_BT is None else segment_BT
    prefix_BS = prefixes(T) if kind == 'prefix' else None
    return Visibility(
        segment_BT, segment_BT, prefix_BS=prefix_BS, causal=kind != 'full', pattern=pattern
    )


@pytest.mark.parametrize('kind', VISIBILITIES)
@pytest.mark.parametrize('name', PATTERNS)
def test_mask_equals_the_definition(name, kind):
    T, pattern = 40, PATTERNS[name]
    segment_BT, prefix_BT = segments(T), prefixes(T)
    expected = np.zeros((B, T, T), bool)
    for b, t, s in np.ndindex(expected.shape):
        ordered = s <= t or kind == 'full' or (kind == 'prefix' and prefix_BT[b, s] > 0)
        same = segment_BT[b, t] == segment_BT[b, s]
        expected[b, t, s] = same and ordered and by_hand(pattern, t, s)
    found = np.asarray(visibility(pattern, kind, T).dense())
    np.testing.assert_array_equal(found, expected)
    assert found[:, np.arange(T), np.arange(T)].all(), 'every query has a key: itself'
    if kind != 'prefix':
        host = patterns.mask(pattern, T, T, causal=kind == 'causal')
        np.testing.assert_array_equal(host, expected[0])


def test_places_count_from_the_end_of_padding():
    pattern = BlockGlobal(4, 1)
    alone = Visibility(np.ones((1, 10), int), np.ones((1, 10), int), pattern=pattern).dense()[0]
    segment_BS = np.repeat([0, 1], [3, 10])[None]
    behind = Visibility(segment_BS, segment_BS, first_B=np.array([3]), pattern=pattern).dense()[0]
    np.testing.assert_array_equal(behind[3:, 3:], alone)
    plain = Visibility(segment_BS, segment_BS, pattern=pattern).dense()[0]
    assert not np.array_equal(plain[3:, 3:], alone)


@functools.cache
def arrays(T):
    random = np.random.default_rng(0)
    return [random.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N)]


def place(x, letters, on):
    return jax.device_put(x, jax.NamedSharding(on, layout.act(letters)))


def output_and_gradients(backend, pattern, kind, T, on):
    """Of `attend`, and of (output * g).sum() with respect to queries, keys and values."""

    def weighted(q_BTNH, k_BSKH, v_BSKH, g_BTNH, visible):
        out_BTNH = kernels.attend(q_BTNH, k_BSKH, v_BSKH, visible=visible, backend=backend)
        return (out_BTNH * g_BTNH).sum(), out_BTNH

    with jax.set_mesh(on):
        visible = jax.tree.map(
            lambda x: place(x, 'BT', on) if np.ndim(x) else x, visibility(pattern, kind, T)
        )
        placed = [place(x, letters, on) for x, letters in zip(arrays(T), LETTERS, strict=True)]
        gradient = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
        (_, out_BTNH), gradients = gradient(*placed, visible)
    return out_BTNH, *gradients


@functools.cache
def reference(name, kind, T):
    one = mesh.make(MeshConfig(), jax.devices()[:1])
    return output_and_gradients('reference', PATTERNS[name], kind, T, one)


@pytest.mark.parametrize(('name', 'kind'), list(itertools.product(PATTERNS, VISIBILITIES)))
def test_blocks_equal_reference(name, kind, one_device):
    T = 150  # ends amid a chunk
    found = output_and_gradients('blocked', PATTERNS[name], kind, T, one_device)
    for array, expected in zip(found, reference(name, kind, T), strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('name', ['dense', 'window', 'dilated', 'blocks and global'])
def test_blocks_divide_over_rows_and_heads(name):
    on = mesh.make(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    found = output_and_gradients('blocked', PATTERNS[name], 'prefix', 150, on)
    for array, expected in zip(found, reference(name, 'prefix', 150), strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ('make', 'named'),
    [
        (lambda: Window(0), 'Window: size is 0'),
        (lambda: Dilated(3, 0), 'Dilated: dilation is 0'),
        (lambda: BlockGlobal(0), 'BlockGlobal: block is 0'),
        (lambda: BlockGlobal(4, -1), 'BlockGlobal: n_global is -1'),
    ],
)
def test_nonsense_is_refused_by_name(make, named):
    with pytest.raises(UserError, match=named):
        make()


@functools.cache
def flops(pattern, T, causal=True):
    """Of the compiled forward pass of attention alone, per token."""

    def attended(q_BTNH, k_BSKH, v_BSKH):
        segment_BT = jnp.ones((1, T), jnp.int32, out_sharding=layout.act('BT'))
        visible = Visibility(segment_BT, segment_BT, causal=causal, pattern=pattern)
        return kernels.attend(q_BTNH, k_BSKH, v_BSKH, visible=visible, backend='auto')

    one = mesh.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(one):
        placed = jax.NamedSharding(one, layout.act('BTNH'))
        shapes = [
            jax.ShapeDtypeStruct((1, T, n, H), jnp.float32, sharding=placed) for n in (N, K, K)
        ]
        return jax.jit(attended).lower(*shapes).compile().cost_analysis()['flops'] / T


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('pattern', [Window(64), Dilated(64, 4), BlockGlobal(64, 4)])
def test_work_grows_linearly_with_the_length(pattern, causal):
    short, long = (flops(pattern, T, causal) for T in (1024, 4096))
    assert long < 1.15 * short, (short, long)
    assert long < 0.35 * flops(Dense(), 4096), 'a pattern is cheaper than all keys'
    assert flops(Dense(), 4096) > 3 * flops(Dense(), 1024), 'the count would show growth'

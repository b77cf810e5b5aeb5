"""What a query sees: patterns, prefix and causality against loops, and blocks against the whole
mask. Other backends are in test_backends.py."""

import functools

import jax
import numpy as np
import pytest

from llama_jax import layout, mesh
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import kernels, patterns, plain
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import BlockGlobal, Dense, Dilated, Window

PATTERNS = {
    'dense': Dense(),
    'window': Window(9),
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


def test_places_may_be_given():
    """As a ring of a cache gives them: keys in any order, slots that hold nothing yet."""
    pattern, ones = BlockGlobal(4, 1), np.ones((1, 10), int)
    whole = np.asarray(Visibility(ones, ones, pattern=pattern).dense()[0])
    place_S = np.random.default_rng(0).permutation(np.arange(-2, 10))
    given = Visibility(
        *(ones[:, :3], (place_S >= 0).astype(int)[None]),
        query_place_BT=np.array([[4, 7, 9]]),
        key_place_BS=place_S[None],
        pattern=pattern,
    )
    expected = np.where(place_S >= 0, whole[[4, 7, 9]][:, np.maximum(place_S, 0)], False)
    np.testing.assert_array_equal(given.dense()[0], expected)


@functools.cache
def arrays(T):
    random = np.random.default_rng(0)
    return [random.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N)]


def place(x, letters, on):
    return jax.device_put(x, jax.NamedSharding(on, layout.act(letters)))


def output_and_gradients(backend, pattern, kind, T, on):
    """Of `attend`, and of (output * g).sum() with respect to queries, keys and values."""

    def weighted(q_BTNH, k_BSKH, v_BSKH, g_BTNH, visible):
        if backend == 'banded':  # at these lengths `blocked` would not take it
            out_BTNH = kernels._per_device(plain.banded)(q_BTNH, k_BSKH, v_BSKH, visible)
        else:
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


@pytest.mark.parametrize(
    ('backend', 'name', 'kind'),
    [
        *(('banded', name, kind) for name in PATTERNS if name != 'dense' for kind in VISIBILITIES),
        *(('blocked', 'dense', kind) for kind in VISIBILITIES),
        ('blocked', 'window', 'prefix'),
    ],
)
def test_blocks_and_bands_equal_reference(backend, name, kind, one_device):
    T = 150  # ends amid a chunk
    found = output_and_gradients(backend, PATTERNS[name], kind, T, one_device)
    for array, expected in zip(found, reference(name, kind, T), strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('name', ['dense', 'dilated', 'blocks and global'])
def test_blocks_divide_over_rows_and_heads(name):
    on = mesh.make(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    backend = 'blocked' if name == 'dense' else 'banded'
    found = output_and_gradients(backend, PATTERNS[name], 'prefix', 150, on)
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

"""Backends under patterns, full visibility, prefix, and between two sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import kernels
from llama_jax.model.cache import Cache, LayerCache
from llama_jax.model.masks import Visibility, across
from llama_jax.model.patterns import Dense, Window
from llama_jax.model.quantized import quantize
from tests.model.test_patterns import (
    LETTERS,
    PATTERNS,
    VISIBILITIES,
    B,
    H,
    K,
    N,
    arrays,
    output_and_gradients,
    place,
    reference,
)

# splash is interpreted here, one block after the other: one case of each kind of its masks.
CASES = [
    ('splash', 'window', 'causal', 128),
    ('splash', 'window', 'full', 128),
    ('splash', 'dilated', 'causal', 128),
    ('splash', 'dense', 'full', 128),
    ('splash', 'blocks and global', 'full', 128),
    *(('xla', 'window', kind, 128) for kind in VISIBILITIES),
]


@pytest.mark.parametrize(('backend', 'name', 'kind', 'T'), CASES)
def test_backend_equals_reference(backend, name, kind, T, one_device):
    found = output_and_gradients(backend, PATTERNS[name], kind, T, one_device)
    for array, expected in zip(found, reference(name, kind, T), strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('pattern', [Dense(), Window(9), Window(1000)])
@pytest.mark.parametrize('causal', [True, False])
def test_library_without_a_mask_sees_the_same(pattern, causal, one_device):
    """What cuDNN is told where a row is one segment, computed by the library's other half."""
    T = 64
    q_BTNH, k_BSKH, v_BSKH, _ = arrays(T)
    segment_BT = jnp.ones((B, T), jnp.int32)
    visible = Visibility(segment_BT, segment_BT, causal=causal, pattern=pattern, whole=True)
    told = kernels._without_mask(visible)
    assert (told is None) == (pattern != Dense() and not causal)
    mask = {'mask': visible.dense()[:, None]}
    found, expected = (
        jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, implementation='xla', **seen)
        for seen in (mask if told is None else told, mask)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_mask_is_left_out_only_where_segments_and_prefix_are_none():
    segment_BT = np.ones((1, 8), np.int32)
    assert kernels._without_mask(Visibility(segment_BT, segment_BT)) is None
    for more in ('prefix_BS', 'key_place_BS', 'until_BS'):
        told = Visibility(segment_BT, segment_BT, whole=True, **{more: segment_BT})
        assert kernels._without_mask(told) is None


@pytest.mark.parametrize('backend', ['reference', 'blocked', 'xla', 'splash'])
def test_one_sequence_looks_at_another(backend, one_device):
    """Cross-attention: as many queries as keys or not; segments meet; padding sees something."""
    T, S = (128, 256) if backend == 'splash' else (20, 33)
    (q_BTNH, _, _, _), (_, k_BSKH, v_BSKH, _) = arrays(T), arrays(S)
    query_BT, key_BS = np.ones((B, T), np.int32), np.ones((B, S), np.int32)
    query_BT[1, 5:], query_BT[1, 11:], key_BS[1, 21:], key_BS[1, 25:] = 2, 0, 2, 0
    key_BS[0, 30:] = 0
    query_BT[0, 9:] = 0
    visible = across(place(query_BT, 'BT', one_device), place(key_BS, 'BS', one_device))
    attend = functools.partial(kernels.attend, visible=visible, backend=backend)
    placed = map(place, (q_BTNH, k_BSKH, v_BSKH), LETTERS[:3], [one_device] * 3)
    found = np.asarray(jax.jit(attend)(*placed))
    assert np.isfinite(found).all()
    for b, t, n in np.ndindex(B, T, N):
        if not query_BT[b, t]:
            continue
        keys, values = (x[b, key_BS[b] == query_BT[b, t], n // (N // K)] for x in (k_BSKH, v_BSKH))
        weight = np.exp(keys @ q_BTNH[b, t, n] / H**0.5)
        np.testing.assert_allclose(found[b, t, n], weight @ values / weight.sum(), atol=2e-5)


@pytest.mark.parametrize('backend', ['blocked', 'xla'])
def test_places_of_ones_own_are_seen_by_their_order(backend, one_device):
    """Those of a row need not rise, as where a text stands there twice."""
    T = 64
    *qkv, _ = (place(x, y, one_device) for x, y in zip(arrays(T), LETTERS, strict=True))
    place_BT = place(np.random.default_rng(1).integers(0, 9, (B, T)), 'BT', one_device)
    segment_BT = place(np.ones((B, T), np.int32), 'BT', one_device)
    places = {'query_place_BT': place_BT, 'key_place_BS': place_BT, 'until_BS': place_BT + 3}
    visible = Visibility(segment_BT, segment_BT, **places)
    found, expected = (
        kernels.attend(*qkv, visible=visible, backend=name) for name in (backend, 'reference')
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ('backend', 'rest', 'named'),
    [
        ('splash', {'prefix_BS': jnp.ones((1, 128), int)}, 'a prefix ends where the data says'),
        ('splash', {'key_place_BS': jnp.ones((1, 128), int)}, 'places that are not known'),
        (
            'blocked',
            {'key_place_BS': jnp.ones((1, 128), int), 'pattern': Window(9)},
            'places that are not known',
        ),
    ],
)
def test_backend_refuses_what_it_cannot_honour(backend, rest, named, one_device):
    segment_BT = jnp.ones((1, 128), jnp.int32)
    q_BTNH = jnp.zeros((1, 128, N, H))
    visible = Visibility(segment_BT, segment_BT, **rest)
    with pytest.raises(UserError) as refused:
        kernels.attend(q_BTNH, q_BTNH[:, :, :K], q_BTNH[:, :, :K], visible=visible, backend=backend)
    assert named in str(refused.value) and repr(backend) in str(refused.value)


@pytest.mark.parametrize(
    ('length', 'integers', 'turned'), [(1, False, 0), (15, False, 0), (16, False, 1), (16, True, 0)]
)
def test_few_queries_and_integers_read_a_cache_as_it_lies(monkeypatch, length, integers, turned):
    """Whatever else `auto` would choose here."""
    monkeypatch.setattr(kernels, '_choose', lambda *_: 'xla')
    calls, attend = [], kernels.attend
    monkeypatch.setattr(kernels, 'attend', lambda *a, **k: calls.append(a) or attend(*a, **k))
    S, rng = 32, np.random.default_rng(0)
    q_BTNH, k_BKHS, v_BKSH = (
        jnp.asarray(rng.normal(size=shape).astype(np.float32))
        for shape in ((B, length, N, H), (B, K, H, S), (B, K, S, H))
    )
    if integers:
        k_BKHS, v_BKSH = quantize(k_BKHS, (2,)), quantize(v_BKSH, (3,))
    cache = Cache([LayerCache(k_BKHS, v_BKSH)])
    with jax.set_mesh(make(MeshConfig(), jax.devices()[:1])):
        visible = cache.visible(jnp.full(B, 9), length, pattern=Dense())
        found, plain = (
            kernels.attend_cached(q_BTNH, k_BKHS, v_BKSH, visible=visible, backend=backend)
            for backend in ('auto', 'reference')
        )
    np.testing.assert_allclose(found, plain, atol=1e-5)
    assert len(calls) == turned

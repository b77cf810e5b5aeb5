"""Scanned and unrolled layers, cached and uncached tokens: one function."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.cache import Cache
from tests.model import tiny
from tests.model.tiny import CONFIG

T, SLOTS = 16, 24


def empty(rows):
    return Cache.empty(CONFIG, batch=rows, slots=SLOTS, dtype=jnp.float32)


@functools.cache
def reader():
    """Compiled: logits of a piece of tokens, and the cache with them."""

    def read(params, token_BT, cache, position_BT, segment_BT):
        return layers.bind(CONFIG, params)(
            token_BT,
            cache=cache,
            position_BT=position_BT,
            segment_BT=segment_BT,
            compute=tiny.REFERENCE,
        )

    return jax.jit(read)


def read_in_pieces(params, token_BT, pieces, position_BT=None, segment_BT=None):
    """Logits of all tokens, read `pieces` at a time through one cache."""
    cache, logits, start = empty(len(token_BT)), [], 0
    for length in pieces:
        part = slice(start, start + length)
        rest = [None if x is None else x[:, part] for x in (position_BT, segment_BT)]
        piece_BTV, cache = reader()(params, token_BT[:, part], cache, *rest)
        logits.append(piece_BTV)
        start += length
    assert int(cache.cursor) == start == token_BT.shape[1]
    return np.concatenate(logits, axis=1)


@functools.cache
def whole(mesh):
    """Logits of two rows without a cache, scanned."""
    params = tiny.parameters(CONFIG, mesh)
    return np.asarray(jax.jit(functools.partial(tiny.model, CONFIG))(params, tiny.token_ids(2, T)))


def test_unrolled_equals_scanned(one_device):
    config = replace(CONFIG, dropout=0.25)
    params, token_BT = tiny.parameters(config, one_device), tiny.token_ids(2, T)
    logits = jax.jit(functools.partial(tiny.model, config))
    key = jax.random.key(3)
    scanned_BTV = logits(params, token_BT, key=key)
    unrolled_BTV = logits(layers.unstack(params), token_BT, key=key)
    np.testing.assert_allclose(unrolled_BTV, scanned_BTV, rtol=0, atol=1e-5)


def test_stack_is_the_inverse_of_unstack(one_device):
    params = tiny.parameters(CONFIG, one_device)
    apart = layers.unstack(params)
    assert len(apart['blocks']) == CONFIG.layers
    jax.tree.map(np.testing.assert_array_equal, layers.stack(apart), params)


@pytest.mark.parametrize('pieces', [(T,), (8, 4, 1, 1, 1, 1)], ids=['whole', 'pieces'])
def test_cached_equals_uncached(pieces, one_device):
    params = layers.unstack(tiny.parameters(CONFIG, one_device))
    logits_BTV = read_in_pieces(params, tiny.token_ids(2, T), pieces)
    np.testing.assert_allclose(logits_BTV, whole(one_device), rtol=0, atol=1e-5)


def test_row_behind_padding_equals_the_row_alone(one_device):
    params = layers.unstack(tiny.parameters(CONFIG, one_device))
    padding = 6
    token_BT = tiny.token_ids(2, T)
    short_BT = token_BT.at[1].set(jnp.roll(token_BT[1], padding))
    place_T = np.arange(T)
    position_BT = np.stack([place_T, np.maximum(place_T - padding, 0)])
    segment_BT = np.stack([np.ones(T, np.int32), (place_T >= padding).astype(np.int32)])
    logits_BTV = read_in_pieces(params, short_BT, (8, 8), position_BT, segment_BT)
    expected_BTV = whole(one_device)
    np.testing.assert_allclose(logits_BTV[0], expected_BTV[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        logits_BTV[1, padding:], expected_BTV[1, : T - padding], rtol=0, atol=1e-5
    )


def test_cache_needs_layers_apart(one_device):
    params = tiny.parameters(CONFIG, one_device)
    with pytest.raises(UserError, match='layers.unstack'):
        jax.eval_shape(lambda: tiny.model(CONFIG, params, tiny.token_ids(1, 4), cache=empty(1)))

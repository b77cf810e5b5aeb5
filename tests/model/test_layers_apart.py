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

    def read(params, token_BT, cache, at_B):
        return layers.bind(CONFIG, params)(token_BT, cache=cache, at_B=at_B, compute=tiny.REFERENCE)

    return jax.jit(read)


def read_in_pieces(params, token_BT, pieces, *, first=True):
    """Logits of all tokens, read `pieces` at a time through one cache; `first`: the first piece
    is told that it is the first."""
    cache, logits, start = empty(len(token_BT)), [], 0
    for length in pieces:
        at_B = None if first and not start else jnp.full(len(token_BT), start)
        piece_BTV, cache = reader()(params, token_BT[:, start : start + length], cache, at_B)
        logits.append(piece_BTV)
        start += length
    assert start == token_BT.shape[1]
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


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('pieces', [(T,), (8, 4, 1, 1, 1, 1)], ids=['whole', 'pieces'])
def test_cached_equals_uncached(pieces, first, one_device):
    params = layers.unstack(tiny.parameters(CONFIG, one_device))
    logits_BTV = read_in_pieces(params, tiny.token_ids(2, T), pieces, first=first)
    np.testing.assert_allclose(logits_BTV, whole(one_device), rtol=0, atol=1e-5)


def test_rows_of_different_lengths_equal_rows_alone(one_device):
    """A row's padding, and what an earlier row left in its slots, are not seen."""
    params = layers.unstack(tiny.parameters(CONFIG, one_device))
    token_BT = tiny.token_ids(2, T)
    _, used = reader()(params, token_BT[::-1], empty(2), None)
    short_BT = token_BT[:, :8].at[1, 5:].set(0)
    _, cache = reader()(params, short_BT, used, None)
    at_B, found = np.array([8, 5]), []
    for _ in range(8):
        piece_BT = token_BT[jnp.arange(2), at_B][:, None]
        logits_BTV, cache = reader()(params, piece_BT, cache, jnp.asarray(at_B))
        found.append(np.asarray(logits_BTV)[:, 0])
        at_B = at_B + 1
    found_BTV, expected_BTV = np.stack(found, axis=1), whole(one_device)
    np.testing.assert_allclose(found_BTV[0], expected_BTV[0, 8:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found_BTV[1], expected_BTV[1, 5:13], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'at_B': jnp.zeros(1, int)}, 'give the cache too'),
        ({'segment_BT': jnp.ones((1, 4), int)}, 'leave segment_BT out'),
        ({'at_B': jnp.zeros(1, int), 'prefix_BT': jnp.ones((1, 4), int)}, 'first piece'),
        ({'causal': False}, 'causal attention'),
    ],
)
def test_what_a_cache_cannot_do_is_refused(wrong, message, one_device):
    params = layers.unstack(tiny.parameters(CONFIG, one_device))
    cache = {} if message == 'give the cache too' else {'cache': empty(1)}
    with pytest.raises(UserError, match=message):
        jax.eval_shape(
            lambda: layers.bind(CONFIG, params)(
                tiny.token_ids(1, 4), **cache, **wrong, compute=tiny.REFERENCE
            )
        )


def test_cache_needs_layers_apart(one_device):
    params = tiny.parameters(CONFIG, one_device)
    with pytest.raises(UserError, match='layers.unstack'):
        jax.eval_shape(lambda: tiny.model(CONFIG, params, tiny.token_ids(1, 4), cache=empty(1)))

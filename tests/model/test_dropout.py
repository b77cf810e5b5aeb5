"""Dropout: where it acts, what it keeps, and that no two places share a key.

That 8 devices drop what one device drops is part of tests/test_layout.py.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import layout
from llama_jax.model import block, layers, transformer
from tests.model import tiny

CONFIG = replace(tiny.CONFIG, dropout=0.25)


def test_without_a_key_there_is_no_dropout(one_device):
    params, token_BT = tiny.parameters(CONFIG, one_device), tiny.token_ids(2, 16)
    off = jax.jit(lambda params, token_BT: tiny.model(CONFIG, params, token_BT))
    never = jax.jit(lambda params, token_BT: tiny.model(tiny.CONFIG, params, token_BT))
    np.testing.assert_array_equal(off(params, token_BT), never(params, token_BT))


def test_mean_is_kept():
    @functools.partial(jax.jit, static_argnums=0)
    def dropped(rate, key):
        return block.drop(jnp.full((8, 64, 64), 3.0, out_sharding=layout.act('BTD')), rate, key)

    y_BTD = np.asarray(dropped(0.25, jax.random.key(0)))
    assert set(np.unique(y_BTD)) == {0, 4}
    # A share of 32768 draws lies within five standard deviations.
    spread = (0.25 * 0.75 / y_BTD.size) ** 0.5
    assert abs((y_BTD == 0).mean() - 0.25) < 5 * spread
    np.testing.assert_array_equal(dropped(0.0, jax.random.key(0)), 3)
    np.testing.assert_array_equal(dropped(0.25, None), 3)


def test_embedding_and_every_sublayer_drop_with_a_key_of_their_own(one_device, monkeypatch):
    used = []

    def record(x_BTD, rate, key):
        used.append(jax.random.key_data(key))
        assert rate == CONFIG.dropout
        return x_BTD

    def keys(params, token_BT):
        tiny.model(CONFIG, params, token_BT, key=jax.random.key(0))
        return used

    monkeypatch.setattr(block, 'drop', record)
    monkeypatch.setattr(transformer, 'drop', record)
    apart = layers.unstack(tiny.parameters(CONFIG, one_device))
    found = [tuple(key.tolist()) for key in jax.jit(keys)(apart, tiny.token_ids(1, 4))]
    assert len(found) == len(set(found)) == 1 + 2 * CONFIG.layers


def test_key_decides_what_is_dropped(one_device):
    params, token_BT = tiny.parameters(CONFIG, one_device), tiny.token_ids(2, 16)
    dropped = jax.jit(lambda key: tiny.model(CONFIG, params, token_BT, key=key))
    once, again, other = (np.asarray(dropped(jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1

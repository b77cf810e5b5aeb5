"""Causality, and no leak between packed documents: by perturbation and by gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import layers
from llama_jax.model.config import Compute
from llama_jax.model.masks import Visibility
from tests.model import tiny
from tests.model.tiny import CONFIG

T = 128  # the least that every backend takes
FIRST, SECOND = 48, 60  # lengths of the documents of a packed row; the rest is padding
SEGMENT_T = np.repeat([1, 2, 0], [FIRST, SECOND, T - FIRST - SECOND])
POSITION_T = np.concatenate([np.arange(n) for n in (FIRST, SECOND, T - FIRST - SECOND)])

packed = functools.partial(dict, segment_BT=SEGMENT_T[None], position_BT=POSITION_T[None])
BACKENDS = ('reference', 'blocked', 'xla', 'splash')


@functools.cache
def forward(backend):
    """Compiled logits [1, T, V] of tokens, segments and positions."""

    def logits(params, token_BT, segment_BT, position_BT):
        return tiny.model(
            *(CONFIG, params, token_BT),
            segment_BT=segment_BT,
            position_BT=position_BT,
            compute=Compute(attention=backend, unroll=1),
        )

    return jax.jit(logits)


@pytest.mark.parametrize('backend', BACKENDS)
def test_changed_token_changes_nothing_before_it_nor_in_other_documents(backend, one_device):
    params = tiny.parameters(CONFIG, one_device)
    token_BT = tiny.token_ids(1, T)
    logits = functools.partial(forward(backend), params, **packed())
    before_TV = np.asarray(logits(token_BT)[0])
    for changed in (20, FIRST, FIRST + 30):
        new_BT = token_BT.at[0, changed].set((token_BT[0, changed] + 1) % CONFIG.vocab)
        after_TV = np.asarray(logits(new_BT)[0])
        same = (SEGMENT_T[changed] != SEGMENT_T) | (np.arange(T) < changed)
        np.testing.assert_array_equal(after_TV[same], before_TV[same])
        assert (np.abs(after_TV - before_TV)[~same].max(axis=-1) > 0).all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_future_tokens_receive_no_gradient(backend, one_device):
    """Gradient of one position's logits with respect to every token's embedding."""
    params = tiny.parameters(CONFIG, one_device)
    position = FIRST + 20

    def score(embed_TD):
        # Each token is a row of its own in the embedding, so that its gradient stands alone.
        own = {**params, 'embed_VD': embed_TD}
        model = layers.bind(CONFIG, own)
        compute = Compute(attention=backend, unroll=1)
        logits_BTV, _ = model(jnp.arange(T)[None], **packed(), compute=compute)
        return jnp.sum(logits_BTV, where=(jnp.arange(T) == position)[:, None])

    embed_TD = jax.random.normal(jax.random.key(1), (T, CONFIG.dim))
    gradient_TD = np.asarray(jax.jit(jax.grad(score))(embed_TD))
    seen = (SEGMENT_T == 2) & (np.arange(T) <= position)
    assert (gradient_TD[~seen] == 0).all()
    assert (np.abs(gradient_TD[seen]).max(axis=-1) > 0).all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_packed_documents_equal_documents_alone(backend, one_device):
    params = tiny.parameters(CONFIG, one_device)
    token_BT = tiny.token_ids(1, T)
    logits = functools.partial(forward(backend), params)
    together_TV = np.asarray(logits(token_BT, **packed())[0])
    # One document and no packing: segments and positions are the defaults.
    alone = jax.jit(lambda token_BT: tiny.model(CONFIG, params, token_BT))
    for start, length in ((0, FIRST), (FIRST, SECOND)):
        document_BT = (
            jnp.zeros((1, T), jnp.int32).at[0, :length].set(token_BT[0, start : start + length])
        )
        expected_TV = alone(document_BT)[0, :length]
        np.testing.assert_allclose(
            together_TV[start : start + length], expected_TV, rtol=0, atol=2e-5
        )


def test_mask_is_written_out():
    segment_BT = jnp.array([[1, 1, 2, 2, 0]])
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(Visibility(segment_BT, segment_BT).dense()[0], expected)
    cached = Visibility(segment_BT[:, 2:4], segment_BT, query_place_BT=jnp.array([[2, 3]]))
    np.testing.assert_array_equal(cached.dense()[0], expected[2:4])

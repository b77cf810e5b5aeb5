"""Log-probabilities of tokens over a sharded vocabulary against whole logits in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.objectives import softmax
from llama_jax.objectives.log_probs import log_probs
from tests.objectives.test_softmax import (
    assert_near,
    inputs,
    make_mesh,
    placed,
    temporary_bytes,
)


@pytest.mark.parametrize('name', ['one device', 'data 2 fsdp 2 tensor 2'])
@pytest.mark.parametrize('padding', [0, 3])
def test_equals_whole_logits_in_float64(name, padding, monkeypatch):
    """With any weight on each token, of both signs; 40 tokens by 7 leave padding in a chunk."""
    monkeypatch.setattr(softmax, 'CHUNK_TOKENS', 7)
    devices = make_mesh(name)
    x_BTD, head_VD, target_BT, _ = inputs()
    target_BT = np.minimum(target_BT, 103 - padding)
    g_BT = np.random.default_rng(1).normal(size=target_BT.shape).astype(np.float32)

    ids_VD = head_VD[: 104 - padding].astype(np.float64)
    logit_BTV = x_BTD @ ids_VD.T
    log_p_BTV = logit_BTV - np.log(np.exp(logit_BTV).sum(-1, keepdims=True))
    one_hot_BTV = np.eye(len(ids_VD))[target_BT]
    dlogit_BTV = g_BT[..., None] * (one_hot_BTV - np.exp(log_p_BTV))
    dhead_VD = np.einsum('BTV,BTD->VD', dlogit_BTV, x_BTD)

    arrays = placed((x_BTD, head_VD, target_BT, g_BT), devices)
    with jax.set_mesh(devices):

        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def total(x_BTD, head_VD, target_BT, g_BT):
            log_p_BT = log_probs(x_BTD, head_VD, target_BT, padding)
            return jnp.sum(log_p_BT * g_BT), log_p_BT

        (_, log_p_BT), (dx_BTD, got_dhead_VD) = jax.jit(total)(*arrays)
    assert dx_BTD.sharding == arrays[0].sharding and got_dhead_VD.sharding == arrays[1].sharding
    np.testing.assert_allclose(log_p_BT, (log_p_BTV * one_hot_BTV).sum(-1), rtol=2e-6, atol=2e-6)
    assert_near(np.asarray(dx_BTD), dlogit_BTV @ ids_VD, 1e-6)
    got_dhead_VD = np.asarray(got_dhead_VD)
    assert_near(got_dhead_VD[: len(ids_VD)], dhead_VD, 1e-6)
    assert not got_dhead_VD[len(ids_VD) :].any()


def test_the_logits_of_a_large_vocabulary_are_never_whole_in_memory():
    def total(x_BTD, head_VD, target_BT, weight_BT):
        return jnp.sum(weight_BT * log_probs(x_BTD, head_VD, target_BT))

    logits = 4 * 8 * 2048 * 128256
    assert temporary_bytes(total, 8, 2048, 64, 128256) < logits / 8

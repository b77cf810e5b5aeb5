"""Token-order prediction against the definition, written out."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.rank import rank_loss
from llama_jax.objectives.token_order import TokenOrder
from tests.objectives.test_softmax import make_mesh, placed

PADDING = 4


def inputs(B=8, T=9, D=16, V=24):
    """Few ids, so that windows hold some twice; documents in a row, some of one token."""
    rng = np.random.default_rng(0)
    segment_BT = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    segment_BT[:, -1] = 0
    weight_BT = rng.choice([0, 1, 2], (B, T), p=[0.2, 0.4, 0.4]).astype(np.float32)
    weight_BT[segment_BT == 0] = 0
    target_BT = rng.integers(0, 5, (B, T)).astype(np.int32) * 4
    target_BT[segment_BT == 0] = 8
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    return x_BTD, rng.normal(size=(V, D)).astype(np.float32), target_BT, weight_BT, segment_BT


def oracle(x_BTD, head_VD, target_BT, weight_BT, segment_BT, window):
    """Zuhri et al. 2025, algorithm 1, position by position: scores W - d of what comes first d
    places after the next token, -inf for the rest; ListNet of these; and its gradients."""
    (B, T), V = target_BT.shape, head_VD.shape[0]
    x_BTD, head_VD = x_BTD.astype(np.float64), head_VD.astype(np.float64)
    total, dlogit_BTV = 0.0, np.zeros((B, T, V))
    for b, t in np.ndindex(B, T):
        if not weight_BT[b, t]:
            continue
        score_V = np.full(V, -np.inf)
        for d in reversed(range(window)):
            if t + d < T and segment_BT[b, t + d] == segment_BT[b, t] and weight_BT[b, t + d]:
                score_V[target_BT[b, t + d]] = window - d
        p_V = np.exp(score_V) / np.exp(score_V).sum()
        logit_V = np.where(np.arange(V) < V - PADDING, head_VD @ x_BTD[b, t], -np.inf)
        log_z = np.log(np.exp(logit_V).sum())
        real = p_V > 0
        total -= weight_BT[b, t] * (p_V[real] * (logit_V[real] - log_z)).sum()
        dlogit_BTV[b, t] = weight_BT[b, t] * (np.exp(logit_V - log_z) - p_V)
    return total, dlogit_BTV @ head_VD, np.einsum('BTV,BTD->VD', dlogit_BTV, x_BTD)


@pytest.mark.parametrize(('name', 'window'), [('one device', 3), ('fsdp 4 tensor 2', 64)])
def test_loss_and_gradients_are_those_of_the_definition(name, window):
    devices, (*arrays, segment_BT) = make_mesh(name), inputs()
    segments = placed((*arrays[:3], segment_BT), devices)[3]
    with jax.set_mesh(devices):
        grad = jax.value_and_grad(lambda *a: -3 * rank_loss(*a, window, PADDING), argnums=(0, 1))
        both = jax.jit(lambda *a: (grad(*a), rank_loss(*a, window, PADDING)))
        (total, grads), alone = jax.device_get(both(*placed(arrays, devices), segments))
    expected, *gradients = oracle(*arrays, segment_BT, window)
    np.testing.assert_allclose([total / -3, alone], expected, rtol=1e-5)
    for one, other in zip(grads, gradients, strict=True):
        np.testing.assert_allclose(one / -3, other, atol=1e-5)


def test_flops_are_those_of_a_second_head():
    config = ModelConfig(
        vocab=96, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=32, context=32
    )
    assert TokenOrder().flops(config, 32) == CausalLM().flops(config, 32) + 6 * 96 * 16


def test_targets_of_a_large_vocabulary_are_never_whole():
    B, T, D, V = 4, 1024, 8, 16384
    devices = make_mesh('one device')
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, where))
        for shape, dtype, where in (
            ((B, T, D), np.float32, layout.act('BTD')),
            ((V, D), np.float32, layout.param('VD')),
            *(((B, T), dtype, layout.act('BT')) for dtype in (np.int32, np.float32, np.int32)),
        )
    ]
    with jax.set_mesh(devices):
        grad = jax.grad(lambda *a: rank_loss(*a, 32), argnums=(0, 1))
        compiled = jax.jit(grad).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * T * V


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'window': 0}, 'window 0: rank 1 to 64'),
        ({'window': 65}, 'window 65'),
        ({'weight': 0}, '0'),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        TokenOrder(**settings)

"""Divergence from a teacher against whole logits in float64, in full and by its top k."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax import layout
from llama_jax.objectives import softmax
from llama_jax.objectives.kl import Mix, Online, TopK, distilled, top_k
from tests.objectives.test_softmax import (
    assert_near,
    inputs,
    make_mesh,
    placed,
    temporary_bytes,
)

PADDING = 4
V = 104
IDS = V - PADDING


def soft(logit_BTV, temperature=1.0):
    logit_BTV = logit_BTV.astype(np.float64)[..., :IDS] / temperature
    return logit_BTV - np.log(np.exp(logit_BTV).sum(-1, keepdims=True))


def teacher_arrays():
    random = np.random.default_rng(5)
    return (
        random.normal(size=(8, 5, 12)).astype(np.float32),
        random.normal(size=(V, 12)).astype(np.float32),
    )


def oracle(arrays, wanted_BTV, mix, *, groups_BTV=None):
    """(total, kl, nll) and the gradient to x; with groups, which are 0 for tokens that count by
    themselves and 1 for the rest, over one outcome for all of the rest."""
    x_BTD, head_VD, target_BT, weight_BT = (np.asarray(x, np.float64) for x in arrays)
    target_BT = target_BT.astype(int)
    alpha, T, z_loss, _ = mix

    def sums(x_BTD):
        logit_BTV = x_BTD @ head_VD.T
        log_q_BTV, log_1_BTV = soft(logit_BTV, T), soft(logit_BTV)
        log_z_BT = np.log(np.exp(logit_BTV[..., :IDS]).sum(-1))
        p, q = np.exp(wanted_BTV), np.exp(log_q_BTV)
        if groups_BTV is not None:
            rest = groups_BTV.astype(bool)
            p, q = (
                np.concatenate([np.where(rest, 0, a), (a * rest).sum(-1, keepdims=True)], -1)
                for a in (p, q)
            )
        kl_BT = np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0)
        kl_BT = kl_BT.sum(-1)
        nll_BT = -np.take_along_axis(log_1_BTV, target_BT[..., None], -1)[..., 0]
        each_BT = alpha * T**2 * kl_BT + (1 - alpha) * (nll_BT + z_loss * log_z_BT**2)
        return np.array([(weight_BT * x).sum() for x in (each_BT, kl_BT, nll_BT)])

    direction = np.random.default_rng(9).normal(size=x_BTD.shape)
    slope = (sums(x_BTD + 1e-5 * direction)[0] - sums(x_BTD - 1e-5 * direction)[0]) / 2e-5
    return sums(x_BTD), direction, slope


def run(name, teacher_of, mix):
    devices = make_mesh(name)
    x_BTD, head_VD, target_BT, weight_BT = inputs()
    arrays = x_BTD, head_VD, np.minimum(target_BT, IDS - 1), weight_BT
    put = placed(arrays, devices)
    theirs = [
        jax.device_put(x, NamedSharding(devices, spec))
        for x, spec in zip(teacher_arrays(), (layout.act('BTD'), layout.param('VD')), strict=True)
    ]
    with jax.set_mesh(devices):

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def total(x_BTD, head_VD, target_BT, weight_BT, theirs):
            sums = distilled(x_BTD, head_VD, target_BT, weight_BT, teacher_of(*theirs), mix)
            return sums.total, sums

        (_, sums), gradients = total(*put, theirs)
        evaluated = jax.jit(lambda *arrays: distilled(*arrays[:4], teacher_of(*arrays[4]), mix))(
            *put, theirs
        )
    np.testing.assert_array_equal(sums, evaluated)
    return arrays, jax.device_get((sums, gradients))


MIX = Mix(alpha=0.7, temperature=2.0, z_loss=0.1, padding=PADDING)


@pytest.mark.parametrize('k', [None, 6, IDS], ids=['online', 'top 6', 'top all'])
@pytest.mark.parametrize('name', ['one device', 'data 2 fsdp 2 tensor 2'])
def test_equals_whole_logits_in_float64(name, k, monkeypatch):
    monkeypatch.setattr(softmax, 'CHUNK_TOKENS', 7)

    def teacher_of(x_BTD, head_VD):
        if k is None:
            return Online(x_BTD, head_VD)
        return top_k(x_BTD, head_VD, k=k, temperature=MIX.temperature, padding=PADDING)

    arrays, (sums, (dx_BTD, dhead_VD)) = run(name, teacher_of, MIX)
    their_x_BTD, their_head_VD = teacher_arrays()
    log_p_BTV = soft(their_x_BTD.astype(np.float64) @ their_head_VD.T, MIX.temperature)
    groups_BTV = None
    if k == 6:
        groups_BTV = log_p_BTV < np.sort(log_p_BTV)[..., -6:-5]
    wanted, direction, slope = oracle(arrays, log_p_BTV, MIX, groups_BTV=groups_BTV)
    np.testing.assert_allclose(sums[:3], wanted, rtol=1e-5)
    np.testing.assert_allclose((dx_BTD * direction).sum(), slope, rtol=1e-4)
    assert not dhead_VD[IDS:].any() and np.isfinite(dhead_VD).all()
    # The gradient of both is that of the same logits.
    assert_near(np.einsum('BTD,BTD->', dx_BTD, arrays[0]), np.sum(dhead_VD * arrays[1]), 1e-4)


@pytest.mark.parametrize('k', [None, 6], ids=['online', 'top 6'])
def test_of_itself_a_model_learns_nothing(k):
    mix = MIX._replace(alpha=1.0)
    x_BTD, head_VD, _, _ = inputs()
    devices = make_mesh('one device')
    with jax.set_mesh(devices):
        x_BTD, head_VD = placed(inputs(), devices)[:2]
        own = Online(x_BTD, head_VD)
        if k:
            own = top_k(*own, k=k, temperature=mix.temperature, padding=PADDING)
    _, (sums, (dx_BTD, dhead_VD)) = run('one device', lambda *_: own, mix)
    assert abs(sums.kl) < 1e-4
    assert np.abs(dx_BTD).max() < 1e-5 and np.abs(dhead_VD).max() < 1e-5
    # Both probabilities are of one head. A compiler may round them apart, in their last bit.
    assert np.abs(dx_BTD).max() < 2e-7 or k


def test_the_top_k_are_those_of_the_whole_vocabulary():
    devices = make_mesh('tensor 8')
    with jax.set_mesh(devices):
        x_BTD, head_VD = placed(inputs(), devices)[:2]
        top = jax.device_get(top_k(x_BTD, head_VD, k=20, temperature=1.0, padding=PADDING))
    assert isinstance(top, TopK)
    log_p_BTV = soft(np.asarray(x_BTD, np.float64) @ np.asarray(head_VD).T)
    wanted = np.argsort(-log_p_BTV)[..., :20]
    np.testing.assert_array_equal(top.id_BTk, wanted)
    p_BTk = np.exp(np.take_along_axis(log_p_BTV, wanted, -1))
    np.testing.assert_allclose(np.exp(top.log_p_BTk), p_BTk, rtol=1e-5)
    np.testing.assert_allclose(np.exp(top.log_rest_BT), 1 - p_BTk.sum(-1), atol=1e-6)


def test_the_logits_of_neither_are_whole_in_memory():
    def total(x_BTD, head_VD, target_BT, weight_BT):
        own = jax.lax.stop_gradient((x_BTD, head_VD))
        mix = Mix(0.5, 1.0, 0.0)
        return distilled(x_BTD, head_VD, target_BT, weight_BT, Online(*own), mix).total

    assert temporary_bytes(total, 8, 2048, 64, 128256) < 4 * 8 * 2048 * 128256 / 4

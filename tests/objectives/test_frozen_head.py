"""A head that is not trained, as beside adapters: the same gradient to the features, and no product
for a gradient of the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.objectives.kl import Mix, Online, distilled, top_k
from llama_jax.objectives.log_probs import log_probs
from llama_jax.objectives.softmax import cross_entropy
from tests.objectives.test_softmax import inputs, make_mesh, placed

MIX = Mix(alpha=0.7, temperature=2.0, z_loss=0.1)


def by_cross_entropy(x_BTD, head_VD, target_BT, weight_BT):
    return cross_entropy(x_BTD, head_VD, target_BT, weight_BT, 0.1).total


def by_log_probs(x_BTD, head_VD, target_BT, weight_BT):
    return jnp.sum(weight_BT * log_probs(x_BTD, head_VD, target_BT))


def by_teacher(x_BTD, head_VD, target_BT, weight_BT):
    teacher = Online(*jax.lax.stop_gradient((-x_BTD, head_VD)))
    return distilled(x_BTD, head_VD, target_BT, weight_BT, teacher, MIX).total


def by_top_k(x_BTD, head_VD, target_BT, weight_BT):
    of_teacher = jax.lax.stop_gradient((-x_BTD, head_VD))
    teacher = top_k(*of_teacher, k=6, temperature=MIX.temperature, padding=0)
    return distilled(x_BTD, head_VD, target_BT, weight_BT, teacher, MIX).total


@pytest.mark.parametrize('name', ['one device', 'data 2 fsdp 2 tensor 2'])
@pytest.mark.parametrize('loss', [by_cross_entropy, by_log_probs, by_teacher, by_top_k])
def test_a_frozen_head_costs_no_gradient(loss, name):
    devices = make_mesh(name)
    x_BTD, *others = placed(inputs(), devices)
    with jax.set_mesh(devices):
        trained, frozen = jax.grad(loss, argnums=(0, 1)), jax.grad(loss)
        dx_BTD, dhead_VD = jax.jit(trained)(x_BTD, *others)
        np.testing.assert_array_equal(jax.jit(frozen)(x_BTD, *others), dx_BTD)
        assert dhead_VD.any()
        products = [
            str(jax.make_jaxpr(gradient)(x_BTD, *others)).count('dot_general')
            for gradient in (trained, frozen)
        ]
    assert products[1] == products[0] - 1

"""The loss of a reward model against loops over pairs in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.objectives.reward import RewardModel
from tests.objectives import preferred
from tests.objectives.pairs import make_mesh, place
from tests.objectives.test_preference import COMPUTE, CONFIG, Lookup, table

OBJECTIVE = RewardModel()
N = 11
RECORDS = preferred.records(N)


@functools.cache
def loss_and_gradient(name):
    devices = make_mesh(name)
    batch = preferred.batch(OBJECTIVE, RECORDS, rows=8)

    def total(table_VD, extra, batch):
        model = Lookup(table_VD, None)
        loss = OBJECTIVE.loss(model, batch, extra=extra, compute=COMPUTE, key=None)
        return loss.total, loss

    with jax.set_mesh(devices):
        extra = {'head_D': jnp.asarray(table(1)[0])}
        run = jax.jit(jax.grad(total, has_aux=True))
        return jax.device_get(run(jnp.asarray(table(0)), extra, place(batch, devices)))


@pytest.mark.parametrize('name', ['one device', 'fsdp 8'])
def test_loss_of_a_packed_batch_equals_loops_over_its_pairs(name):
    """The reward is read at the last token of each answer, and margins count."""
    gradient_VD, loss = loss_and_gradient(name)
    features_VD, head_D = table(0).astype(np.float64), table(1)[0].astype(np.float64)
    last_P2 = np.array([[ids[-1] for ids in record.parts] for record in RECORDS])
    reward_P2 = features_VD[last_P2] @ head_D
    margin_P = np.array([record.number for record in RECORDS])
    assert len(set(margin_P)) > 1
    better_P = reward_P2[:, 0] - reward_P2[:, 1]
    each_P = np.logaddexp(0, -(better_P - margin_P))
    assert loss.weight == N
    np.testing.assert_allclose(loss.total, each_P.sum(), rtol=1e-5)
    for metric, wanted in (
        ('accuracy', (better_P > 0).mean()),
        ('margin', better_P.mean()),
        ('reward_chosen', reward_P2[:, 0].mean()),
        ('reward_rejected', reward_P2[:, 1].mean()),
    ):
        np.testing.assert_allclose(loss.metrics[metric] / N, wanted, rtol=1e-5, err_msg=metric)
    wanted_VD = np.zeros_like(features_VD)
    d_P = -np.exp(-np.logaddexp(0, better_P - margin_P))
    for (chosen, rejected), d in zip(last_P2, d_P, strict=True):
        wanted_VD[chosen] += d * head_D
        wanted_VD[rejected] -= d * head_D
    np.testing.assert_allclose(gradient_VD, wanted_VD, atol=1e-5)


def test_the_head_is_a_parameter_of_its_own():
    extra = OBJECTIVE.extra(CONFIG, jax.random.key(0))
    assert {name: x.shape for name, x in extra.items()} == {'head_D': (CONFIG.dim,)}
    assert OBJECTIVE.whole((7, 5), seq_len=64) == (7, 5)  # the last token is read

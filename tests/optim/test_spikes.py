"""Skipped spikes of the loss against numpy's mean and variance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.errors import UserError
from llama_jax.optim import AdamW, Muon
from llama_jax.optim.base import optimizer
from llama_jax.optim.spikes import FIRST, LEAST_DEVIATIONS, without_spikes


def test_a_spike_moves_nothing_and_what_stays_high_is_learnt_from_again():
    """Losses of mean 3 and deviation 0.1, one spike, and then a level that stays."""
    rng = np.random.default_rng(0)
    losses = 3 + 0.1 * rng.normal(size=60)
    losses[FIRST - 1] = 3.6  # before so many are seen that anything is a spike
    losses[FIRST] = 9.0
    losses = np.concatenate([losses, np.full(200, 9.0)])
    tx = without_spikes(optax.trace(0.999), 5.0)
    params = {'w_DF': jnp.ones((2, 3))}
    state, moved, inner = tx.init(params), [], []
    update = jax.jit(tx.update)
    for loss in losses:
        directions, state = update(params, state, params, value=jnp.float32(loss))
        moved.append(float(directions['w_DF'][0, 0]) > 0)
        inner.append(float(state.inner.trace['w_DF'][0, 0]))
        if len(moved) == FIRST:
            np.testing.assert_allclose(state.mean, losses[:FIRST].mean(), rtol=1e-5)
            np.testing.assert_allclose(state.variance, losses[:FIRST].var(), rtol=1e-4)
        if len(moved) == FIRST + 1:  # counted as one at the bound
            bound = losses[:FIRST].mean() + 5 * losses[:FIRST].std()
            seen = np.append(losses[:FIRST], bound)
            np.testing.assert_allclose(state.mean, seen.mean(), rtol=1e-5)
            np.testing.assert_allclose(state.variance, seen.var(), rtol=1e-4)
    assert not moved[FIRST] and all(moved[i] for i in range(60) if i != FIRST)
    assert inner[FIRST] == inner[FIRST - 1] < inner[FIRST + 1]
    assert int(state.spikes) == moved.count(False)
    assert not moved[60] and all(moved[160:])


@pytest.mark.parametrize('kind', [AdamW, Muon])
def test_it_is_a_setting_of_every_optimizer(kind):
    params = {'down_FD': jnp.ones((4, 3)), 'scale_D': jnp.ones(3)}
    tx, plain = optimizer(kind(spikes=6.0)), optimizer(kind())
    wanted, _ = plain.update(params, plain.init(params), params)
    got, _ = tx.update(params, tx.init(params), params, value=jnp.float32(3.0))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    for few in (-1, 0.5, 1.9, math.inf):
        with pytest.raises(UserError, match=rf'--optimizer\.spikes is {few}: .* 2 and more'):
            optimizer(kind(spikes=few))


def test_by_the_least_deviations_a_loss_that_stays_high_is_learnt_from_again():
    tx = without_spikes(optax.identity(), LEAST_DEVIATIONS)
    params = {'w_D': jnp.zeros(1)}
    state = tx.init(params)
    losses = [3.0 + 0.1 * (-1) ** i for i in range(2 * FIRST)] + [4.0] * 200
    update = jax.jit(tx.update)
    for loss in losses:
        moved, state = update({'w_D': jnp.ones(1)}, state, params, value=jnp.float32(loss))
    assert float(moved['w_D'][0]) == 1.0 and 0 < int(state.spikes) < 100

"""Muon and Adafactor against those of PyTorch, for one matrix.

Run: make test-parity."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.optim import Adafactor, Muon
from llama_jax.optim.base import optimizer

pytestmark = pytest.mark.parity
RATE, DECAY, STEPS = 0.05, 0.1, 5


def pulled(config, start, gradients, rate):
    """The matrix after all gradients."""
    tx = optimizer(config)
    params = {'down_FD': jnp.asarray(start)}
    state = tx.init(params)
    for g in gradients:
        directions, state = tx.update({'down_FD': jnp.asarray(g)}, state, params)
        params = {'down_FD': params['down_FD'] - rate(params) * directions['down_FD']}
    return np.asarray(params['down_FD'])


def theirs(make, start, gradients):
    import torch

    # PyTorch keeps a matrix as [outputs, inputs].
    weight = torch.nn.Parameter(torch.tensor(start.T))
    tx = make(weight)
    for g in gradients:
        weight.grad = torch.tensor(g.T)
        tx.step()
    return weight.detach().numpy().T


@pytest.mark.parametrize('shape', [(24, 16), (16, 24)])
def test_muon_is_torch_s(shape):
    import torch

    rng = np.random.default_rng(0)
    start, *gradients = (rng.normal(size=shape).astype(np.float32) for _ in range(1 + STEPS))
    config = Muon(weight_decay=DECAY, clip=1e9)
    ours = pulled(config, start, gradients, lambda params: RATE)
    wanted = theirs(
        lambda w: torch.optim.Muon(
            [w], lr=RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn='match_rms_adamw'
        ),
        start,
        gradients,
    )
    moved = np.linalg.norm(wanted - start)
    # They iterate in bfloat16, of 8 bits.
    assert np.linalg.norm(ours - wanted) < 0.02 * moved
    assert moved > 0.02 * np.linalg.norm(start)


def test_adafactor_is_torch_s():
    """Theirs has the learning rate times the size of the parameter."""
    import torch

    rng = np.random.default_rng(1)
    start, *gradients = (rng.normal(size=(12, 8)).astype(np.float32) for _ in range(1 + STEPS))

    def rate(params):
        return RATE * float(jnp.sqrt((params['down_FD'] ** 2).mean()))

    ours = pulled(Adafactor(weight_decay=0.0, clip=1e9), start, gradients, rate)
    wanted = theirs(
        lambda w: torch.optim.Adafactor([w], lr=RATE, weight_decay=0.0), start, gradients
    )
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)

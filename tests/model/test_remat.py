"""Rematerialisation policies: the same result, less memory."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.model.config import Compute
from tests.model import tiny

# Large enough for the activations of the layers to outweigh all else.
CONFIG = replace(
    tiny.CONFIG, dim=64, layers=16, heads=8, kv_heads=4, head_dim=16, ffn=192, dropout=0.1
)
BATCH, LENGTH = 4, 64
POLICIES = ('none', 'dots', 'named', 'full')


@functools.cache
def results(remat, mesh):
    """Loss, gradients, and the bytes of temporary memory that both together take."""
    compute = replace(tiny.REFERENCE, remat=remat)
    key = jax.random.key(1)  # dropout has to repeat itself in the backward pass
    loss = functools.partial(tiny.loss, CONFIG, compute=compute, key=key)
    arguments = (tiny.parameters(CONFIG, mesh), tiny.token_ids(BATCH, LENGTH))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    return *compiled(*arguments), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize('remat', POLICIES[1:])
def test_policy_changes_neither_loss_nor_gradients(remat, one_device):
    loss, gradients, _ = results(remat, one_device)
    expected_loss, expected, _ = results('none', one_device)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for found, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-5 * largest)


@pytest.mark.slow
def test_policies_trade_memory_for_work(one_device):
    none, dots, named, full = (results(remat, one_device)[2] for remat in POLICIES)
    assert full < 0.8 * min(dots, named), (none, dots, named, full)
    assert max(dots, named) < 0.8 * none, (none, dots, named, full)


def test_unknown_policy_is_refused(one_device):
    params = tiny.parameters(tiny.CONFIG, one_device)
    unknown = functools.partial(tiny.model, tiny.CONFIG, compute=Compute(remat='some'))
    with pytest.raises(UserError, match="compute.remat 'some'"):
        jax.eval_shape(unknown, params, tiny.token_ids(1, 8))

"""bfloat16 compute: float32 parameters and gradients, and a measured distance from float32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import precision
from llama_jax.model import layers
from llama_jax.model.config import Compute
from tests.model import tiny
from tests.model.tiny import CONFIG


def relative(found, expected):
    """Norm of the difference over the norm of what is expected."""
    found, expected = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (found, expected)
    )
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32(one_device):
    params, token_BT = tiny.parameters(CONFIG, one_device), tiny.token_ids(4, 64)

    def results(compute):
        def loss(params):
            logits_BTV = tiny.model(CONFIG, params, token_BT, compute=compute)
            return jnp.mean(jnp.square(logits_BTV)), logits_BTV

        (_, logits_BTV), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return logits_BTV, gradients

    logits_BTV, gradients = results(replace(tiny.REFERENCE, precision='bfloat16'))
    expected_BTV, expected = results(tiny.REFERENCE)
    assert logits_BTV.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype('float32')}
    # bfloat16 rounds to 2^-9 = 0.002 of a value, dozens of times in a row. Measured on this model:
    # logits 0.0155, gradients 0.017 (jax 0.10) and 0.019 (jax 0.12).
    assert 1e-4 < relative(logits_BTV, expected_BTV) < 0.025
    assert 1e-4 < relative(gradients, expected) < 0.03


def test_setting_names_the_type_of_activations(one_device):
    params = tiny.parameters(CONFIG, one_device)
    for name in ('float32', 'bfloat16'):
        features = jax.eval_shape(
            lambda params, name=name: layers.bind(CONFIG, params).features(
                tiny.token_ids(1, 8), compute=Compute(name, 'reference')
            )[0],
            params,
        )
        assert features.dtype == precision.dtype(name) == jnp.dtype(name)
        with precision.matmuls(name):
            expected = 'highest' if name == 'float32' else 'default'
            assert jax.config.jax_default_matmul_precision == expected

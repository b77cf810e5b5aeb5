"""RMSNorm and SwiGLU against float64 numpy, written out from the papers."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model.mlp import SwiGLU
from llama_jax.model.norm import RMSNorm
from tests.model.tiny import CONFIG


def test_rms_norm_equals_float64():
    random = np.random.default_rng(0)
    x_BTD, scale_D = random.normal(size=(2, 3, 32)), random.normal(size=32)
    x_BTD[0, 0] *= 1e-3  # where eps counts
    norm = RMSNorm(32, eps=1e-5)
    norm.scale_D[...] = jnp.asarray(scale_D, jnp.float32)
    expected = x_BTD / np.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-5) * scale_D
    found = norm(jnp.asarray(x_BTD, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_rms_norm_of_bfloat16_is_taken_in_float32():
    # Rounded once, at the end; an inverse root rounded to bfloat16 would shift half of the entries.
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 512)), jnp.bfloat16)
    x_f64 = np.asarray(x_BTD, np.float64)
    expected = x_f64 / np.sqrt((x_f64**2).mean(-1, keepdims=True) + 1e-5)
    y_BTD = RMSNorm(512, eps=1e-5)(x_BTD)
    assert y_BTD.dtype == jnp.bfloat16
    assert np.mean(y_BTD != jnp.asarray(expected, jnp.bfloat16)) < 0.005


def test_swiglu_equals_float64():
    x_BTD = np.random.default_rng(0).normal(size=(2, 3, CONFIG.dim))
    mlp = SwiGLU(CONFIG, sublayers=2 * CONFIG.layers, key=jax.random.key(0))
    gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.gate_DF, mlp.up_DF, mlp.down_FD))
    hidden = x_BTD @ gate
    expected = (hidden / (1 + np.exp(-hidden)) * (x_BTD @ up)) @ down
    found = mlp(jnp.asarray(x_BTD, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert mlp(jnp.asarray(x_BTD, jnp.bfloat16)).dtype == jnp.bfloat16

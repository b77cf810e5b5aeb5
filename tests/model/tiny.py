"""A decoder small enough to compile in a second, with its parameters and tokens."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig

CONFIG = ModelConfig(
    vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=128
)
REFERENCE = Compute(attention='reference', unroll=1)  # compiles in half the time of unrolled


@functools.cache
def _parameters(config, mesh):
    return layers.create(config, jax.random.key(0), mesh)


def parameters(config, mesh):
    """Initial parameters on `mesh`, the same on every mesh; norms are moved off one."""
    params = _parameters(replace(config, dropout=0.0), mesh)
    return jax.tree.map(lambda x: x if x.ndim > 2 else x * 1.5, params)


def token_ids(rows, length, *, config=CONFIG, seed=0):
    """Random ids [rows, length]."""
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(config.vocab, size=(rows, length)), jnp.int32)


def model(config, params, token_BT, *, compute=REFERENCE, **rest):
    """Float32 logits of a forward pass without a cache."""
    return layers.bind(config, params)(token_BT, compute=compute, **rest)[0]


def loss(config, params, token_BT, *, compute=REFERENCE, **rest):
    """A number that depends on every logit."""
    logits_BTV = model(config, params, token_BT, compute=compute, **rest)
    return jnp.mean(jnp.square(jax.nn.log_softmax(logits_BTV)))

"""A decoder small enough to compile in a second, with its parameters and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import layout, trees
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig

CONFIG = ModelConfig(
    vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=128
)
REFERENCE = Compute(attention='reference', unroll=1)  # compiles in half the time of unrolled


@functools.cache
def parameters(config, mesh):
    """Random parameters on `mesh`, the same on every mesh. NumPy draws them: nothing to compile.

    Scales of norms stand around one; matrices have variance 1 / D or less.
    """
    random = np.random.default_rng(0)

    def draw(path, spec):
        if path.endswith('scale_D'):
            return (1 + 0.2 * random.standard_normal(spec.shape)).astype(np.float32)
        return (random.standard_normal(spec.shape) / config.dim**0.5).astype(np.float32)

    params = trees.map_named(draw, layers.abstract(config))
    return jax.device_put(params, layout.shardings(params, mesh))


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

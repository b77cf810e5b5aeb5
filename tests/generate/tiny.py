"""A tiny model to generate with, and its plain forward pass."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import trees
from llama_jax.generate.generator import Generator
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig

CONFIG = ModelConfig(
    vocab=96, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, context=256
)
COMPUTE = Compute()
N = 41
"""Tokens that most tests generate: the same shapes, compiled once."""


def mesh_of(n=1, **axes):
    return make(MeshConfig(**axes), jax.devices()[:n])


@functools.cache
def weights():
    """Weights large enough that greedy text does not fall into a loop of one token."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path.endswith('scale_D'):
            return (1 + 0.1 * values).astype(np.float32)
        return (values * (1 if path == 'embed_VD' else 0.5)).astype(np.float32)

    return trees.map_named(draw, layers.abstract(CONFIG))


@functools.cache
def generator(mesh_axes=(), n_devices=1, eos_ids=(), prefill_chunk=512):
    return Generator(
        CONFIG,
        weights(),
        mesh=mesh_of(n_devices, **dict(mesh_axes)),
        compute=COMPUTE,
        eos_ids=eos_ids,
        pad_id=0,
        prefill_chunk=prefill_chunk,
    )


@functools.cache
def forward():
    """Plain next-token logits of a whole row, no cache; padded at the end to compile once."""
    mesh = mesh_of()
    params = jax.device_put(
        weights(), jax.tree.map(lambda x: jax.NamedSharding(mesh, jax.P()), weights())
    )
    step = jax.jit(lambda token_BT: layers.bind(CONFIG, params)(token_BT, compute=COMPUTE)[0])

    def logits(tokens):
        token_BT = np.zeros((1, CONFIG.context), np.int32)
        token_BT[0, : len(tokens)] = tokens
        with jax.set_mesh(mesh):
            return np.asarray(step(token_BT))[0, len(tokens) - 1]

    return logits


def uncached(prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(forward()(tokens).argmax()))
    return tokens[len(prompt) :]


def prompt_of(length, seed=0):
    return np.random.default_rng([seed, length]).integers(1, CONFIG.vocab, length).tolist()


def tokens_of(completions):
    return [completion.tokens for completion in completions]


@contextlib.contextmanager
def nothing_compiles():
    """Within it JAX compiles no program."""
    compiled = []

    def count(event, _, **kwargs):
        if 'compile' in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x * 2.5 + 1)(jnp.ones(3))
        assert compiled, 'the count sees compilations'
        compiled.clear()
        yield
        assert not compiled
    finally:
        jax._src.monitoring.unregister_event_duration_listener(count)

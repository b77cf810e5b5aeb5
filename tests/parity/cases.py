"""Small LLaMA decoders with weights from a seed, and what is kept of their results as goldens.

Weights come from `numpy.random.RandomState(seed).standard_normal`, whose stream NumPy has frozen,
tensor by tensor in the order of `weights`; nothing here needs PyTorch.
"""

import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np

from llama_jax.model.config import ModelConfig, RopeScaling

N_TOKENS = 300
TOLERANCE = 2e-4
"""Largest difference of any float32 logit, loss or gradient entry from transformers'."""
GOLDENS = Path(__file__).parents[1] / 'goldens'


def _case(**changes):
    shape = dict(vocab=256, dim=64, layers=3, heads=4, kv_heads=4, head_dim=16, ffn=172)
    rest = dict(context=2048, rope_theta=1e4, norm_eps=1e-5)
    return ModelConfig(**(shape | rest | changes))


def _stretched(factor):
    # A quarter of the released 8192 tokens is 2048; with 64, wavelengths of 16 and 64 tokens and
    # more are stretched, so that 300 tokens show it.
    return RopeScaling(factor=factor, low=1.0, high=4.0, original_context=64)


CASES = {
    'llama1': _case(norm_eps=1e-6),
    'llama2': _case(heads=8, kv_heads=2, context=4096),
    'llama3': _case(heads=8, kv_heads=4, context=8192, rope_theta=5e5, ffn=224),
    'llama3_1': _case(
        heads=8, kv_heads=2, context=512, rope_theta=5e5, rope_scaling=_stretched(8.0)
    ),
    'llama3_2': _case(
        dim=72,  # a head is not dim / heads wide
        heads=6,
        kv_heads=2,
        context=2048,
        rope_theta=5e5,
        rope_scaling=_stretched(32.0),
        tied=True,
    ),
}


def token_ids(config):
    """One row of 300 ids [1, 300]: bytes of real text, a module that has not changed since 2004."""
    source = importlib.util.find_spec('this').origin
    text = Path(source).read_bytes()
    assert hashlib.sha256(text).hexdigest().startswith('481d0cb3de511eae'), f'{source} has changed'
    return np.frombuffer(text[:N_TOKENS], np.uint8).astype(np.int32)[None] % config.vocab


def weights(config, seed):
    """The state dict of a Hugging Face Llama, float32, from a seed.

    Matrices have variance 1 / inputs (queries and keys more, so that attention is not flat), scales
    stand around 1.
    """
    random = np.random.RandomState(seed)
    c, tensors = config, {}

    def matrix(name, outputs, inputs, gain=1.0):
        w = random.standard_normal((outputs, inputs)) * (gain / math.sqrt(inputs))
        tensors[name] = w.astype(np.float32)

    def scale(name):
        tensors[name] = (1 + 0.2 * random.standard_normal(c.dim)).astype(np.float32)

    matrix('model.embed_tokens.weight', c.vocab, c.dim)
    for i in range(c.layers):
        layer = f'model.layers.{i}.'
        scale(layer + 'input_layernorm.weight')
        matrix(layer + 'self_attn.q_proj.weight', c.heads * c.head_dim, c.dim, gain=1.5)
        matrix(layer + 'self_attn.k_proj.weight', c.kv_heads * c.head_dim, c.dim, gain=1.5)
        matrix(layer + 'self_attn.v_proj.weight', c.kv_heads * c.head_dim, c.dim)
        matrix(layer + 'self_attn.o_proj.weight', c.dim, c.heads * c.head_dim)
        scale(layer + 'post_attention_layernorm.weight')
        matrix(layer + 'mlp.gate_proj.weight', c.ffn, c.dim)
        matrix(layer + 'mlp.up_proj.weight', c.ffn, c.dim)
        matrix(layer + 'mlp.down_proj.weight', c.dim, c.ffn)
    scale('model.norm.weight')
    if not config.tied:
        matrix('lm_head.weight', c.vocab, c.dim)
    return tensors


def digest(logits, loss, gradients):
    """What a golden keeps: some rows of logits, the loss, and of each gradient norm and samples.

    Args:
      logits: [1, 300, V].
      loss: mean negative log-likelihood of the 299 next tokens, nats.
      gradients: of the loss, by name of the Hugging Face tensor.
    """
    kept = {'logits': logits[0, ::13], 'loss': np.float32(loss)}
    for name, gradient in sorted(gradients.items()):
        flat = gradient.astype(np.float64).ravel()
        stride = max(1, flat.size // 61)
        kept[f'norm/{name}'] = np.float32(np.linalg.norm(flat))
        kept[f'gradient/{name}'] = flat[::stride].astype(np.float32)
    return kept


def golden_path(name):
    return GOLDENS / f'parity_{name}.npz'


def read_golden(name):
    with np.load(golden_path(name)) as file:
        return dict(file)

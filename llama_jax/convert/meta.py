"""Weights as Meta releases them: params.json and the tensors of consolidated.00.pth.

Meta's code turns neighbouring dimensions of a head, 2i with 2i + 1, ours i with i + H/2 (Hugging
Face's order): the same function once the rows of query and key projections are permuted. Models
released in several files (13B and larger) are split over tensors: join them first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.convert import tensors as tensors_lib
from llama_jax.convert.tensors import Scheme
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig, RopeScaling
from llama_jax.model.layers import Params


def interleaved(w_XHD: np.ndarray) -> np.ndarray:
    """Rows of each head from half-split order (0, H/2, 1, ...) to interleaved pairs."""
    X, H, D = w_XHD.shape
    return w_XHD.reshape(X, 2, H // 2, D).swapaxes(1, 2).reshape(X, H, D)


def half_split(w_XHD: np.ndarray) -> np.ndarray:
    """The inverse of `interleaved`."""
    X, H, D = w_XHD.shape
    return w_XHD.reshape(X, H // 2, 2, D).swapaxes(1, 2).reshape(X, H, D)


META = Scheme(
    name='Meta LLaMA',
    table={
        'embed_VD': ('tok_embeddings.weight', 'V,D'),
        'norm.scale_D': ('norm.weight', 'D'),
        'head_VD': ('output.weight', 'V,D'),
        'blocks.attention_norm.scale_D': ('layers.{i}.attention_norm.weight', 'D'),
        'blocks.attention.q_DNH': ('layers.{i}.attention.wq.weight', 'NH,D'),
        'blocks.attention.k_DKH': ('layers.{i}.attention.wk.weight', 'KH,D'),
        'blocks.attention.v_DKH': ('layers.{i}.attention.wv.weight', 'KH,D'),
        'blocks.attention.out_NHD': ('layers.{i}.attention.wo.weight', 'D,NH'),
        'blocks.mlp_norm.scale_D': ('layers.{i}.ffn_norm.weight', 'D'),
        'blocks.mlp.gate_DF': ('layers.{i}.feed_forward.w1.weight', 'F,D'),
        'blocks.mlp.up_DF': ('layers.{i}.feed_forward.w3.weight', 'F,D'),
        'blocks.mlp.down_FD': ('layers.{i}.feed_forward.w2.weight', 'D,F'),
    },
    frequencies='rope.freqs',
    to_pairs=interleaved,
    from_pairs=half_split,
)

_KNOWN = {
    *('dim', 'n_layers', 'n_heads', 'n_kv_heads', 'vocab_size', 'multiple_of'),
    *('ffn_dim_multiplier', 'norm_eps', 'rope_theta', 'use_scaled_rope'),
}


def config_from_meta(
    settings: Mapping[str, Any],
    *,
    vocab: int,
    tied: bool,
    context: int,
    rope_factor: float | None,
) -> ModelConfig:
    """The architecture that params.json describes, and what it leaves unsaid.

    Args:
      settings: the contents of params.json.
      vocab: rows of 'tok_embeddings.weight' (params.json of LLaMA 1 and 2 says -1).
      tied: whether 'output.weight' equals the embedding (Llama 3.2 1B and 3B).
      context: longest sequence, in tokens.
      rope_factor: stretch where 'use_scaled_rope' is set: 8 for Llama 3.1 and 3.3, 32 for 3.2.

    Raises UserError for settings that the decoder does not have.
    """
    for name, value in settings.items():
        if name not in _KNOWN and value is not None:
            raise UserError(f'params.json: {name} = {value!r} is not supported')
    for name in ('dim', 'n_layers', 'n_heads', 'multiple_of', 'norm_eps'):
        if name not in settings:
            raise UserError(f'params.json: {name} is missing')
    if settings.get('vocab_size', -1) not in (-1, vocab):
        raise UserError(
            f'params.json: vocab_size is {settings["vocab_size"]}, the embedding has {vocab} rows'
        )
    scaled = settings.get('use_scaled_rope', False)
    if scaled and rope_factor is None:
        raise UserError(
            'params.json: use_scaled_rope does not say by how much: pass rope_factor, 8 for '
            'Llama 3.1 and 3.3, 32 for Llama 3.2'
        )
    if not scaled and rope_factor is not None:
        raise UserError(f'params.json has no scaled rope: rope_factor {rope_factor} must be None')
    heads, dim = settings['n_heads'], settings['dim']
    if dim % heads:
        raise UserError(f'params.json: dim {dim} is no multiple of n_heads {heads}')
    return ModelConfig(
        vocab=vocab,
        dim=dim,
        layers=settings['n_layers'],
        heads=heads,
        kv_heads=settings.get('n_kv_heads') or heads,
        head_dim=dim // heads,
        ffn=_hidden(dim, settings['multiple_of'], settings.get('ffn_dim_multiplier')),
        context=context,
        rope_theta=settings.get('rope_theta', 1e4),
        rope_scaling=RopeScaling(factor=rope_factor) if rope_factor else None,
        norm_eps=settings['norm_eps'],
        tied=tied,
    )


def _hidden(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Hidden units: two thirds of 4 dim, times the multiplier, rounded up."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def params_from_meta(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Stacked float32 parameters from Meta's tensors by name; see `tensors.to_params`."""
    return tensors_lib.to_params(META, tensors, config)


def params_to_meta(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Meta's tensors by name, float32, from stacked parameters. A tied head is written out."""
    tensors = tensors_lib.from_params(META, params, config)
    if config.tied:
        tensors['output.weight'] = tensors['tok_embeddings.weight']
    return tensors

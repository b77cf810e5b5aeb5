"""Weights as Meta releases them: params.json and the tensors of consolidated.00.pth.

Meta's code turns neighbouring dimensions of a head, 2i with 2i + 1, ours i with i + H/2 (Hugging
Face's order): the same function once the rows of query and key projections are permuted. Models
released in several files (13B and larger) are split over tensors, which `meta_files` joins.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.convert import params as convert_params
from llama_jax.convert.directory import UNQUANTISED
from llama_jax.convert.renamed import from_params
from llama_jax.convert.tensors import Scheme
from llama_jax.convert.values import count, number, unsupported
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig, RopeScaling
from llama_jax.model.layers import Params
from llama_jax.model.patterns import Dense, Window

log = logging.getLogger(__name__)


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
    to_pairs=interleaved,
    from_pairs=half_split,
    tied='"tied_embeddings": true in params.json',
)

_READ = {
    *('dim', 'n_layers', 'n_heads', 'n_kv_heads', 'head_dim', 'vocab_size', 'multiple_of'),
    *('ffn_dim_multiplier', 'hidden_dim', 'norm_eps', 'rope_theta', 'use_scaled_rope'),
    *('rope_scaling_factor', 'max_seq_len', 'sliding_window', 'tied_embeddings'),
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    'rope_high_freq_factor': (4,),
    'vision_chunk_size': (-1,),
    'vision_num_cross_attention_layers': (-1,),
    **dict.fromkeys(('use_qk_norm', 'use_biases', 'attn_temperature_tuning'), (False,)),
    **dict.fromkeys(('moe', 'moe_args', 'nope_layer_interval', 'attention_chunk_size'), ()),
    **dict.fromkeys(('vision_args', 'vision_model', 'vision_encoder', 'multimodal'), ()),
    **dict.fromkeys(('yarn', 'llama_4_scaling', 'ffn_exp', 'lora_args'), ()),
}
"""Keys with an effect -> the values that the decoder has. Null is one of them."""
_QUANTISED = ('quantization_args', 'quantization')
_WITHOUT_EFFECT = {
    *(
        'max_batch_size',
        'vision_max_num_chunks',
        'floor_scale',
        'attn_scale',
        'model_parallel_size',
    ),
    *('model_type', 'causal'),
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
      settings: the contents of params.json, after `check`.
      vocab: rows of 'tok_embeddings.weight' (params.json of LLaMA 1 and 2 says -1).
      tied: whether 'output.weight' equals the embedding (Llama 3.2 1B and 3B).
      context: longest sequence, in tokens.
      rope_factor: stretch where 'use_scaled_rope' is set: 8 for Llama 3.1 and 3.3, 32 for 3.2.

    Raises UserError for settings that are missing or make no sense.
    """
    dim, heads = (count(settings, name, 'params.json') for name in ('dim', 'n_heads'))
    if (settings.get('vocab_size') or -1) not in (-1, vocab):
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
    if settings.get('head_dim') is None and dim % heads:
        raise UserError(f'params.json: dim {dim} is no multiple of n_heads {heads}')
    window = count(settings, 'sliding_window', 'params.json', context)
    return ModelConfig(
        vocab=vocab,
        dim=dim,
        layers=count(settings, 'n_layers', 'params.json'),
        heads=heads,
        kv_heads=count(settings, 'n_kv_heads', 'params.json', heads),
        head_dim=count(settings, 'head_dim', 'params.json', dim // heads),
        ffn=_hidden(settings, dim),
        context=context,
        rope_theta=number(settings, 'rope_theta', 'params.json', 1e4),
        rope_scaling=RopeScaling(factor=rope_factor) if rope_factor else None,
        norm_eps=number(settings, 'norm_eps', 'params.json'),
        tied=tied,
        pattern=Window(window) if window < context else Dense(),
    )


def check(settings: Mapping[str, Any]) -> None:
    """Raise UserError for what the decoder does not have. Warn, in one line, of unknown keys."""
    unknown = []
    for name, value in settings.items():
        if value is None or name in _READ | _WITHOUT_EFFECT:
            continue
        if name in _QUANTISED:
            raise UserError(f'params.json: {name} says that weights are quantised: {UNQUANTISED}')
        if name not in _NEUTRAL:
            unknown.append(name)
        elif value not in _NEUTRAL[name]:
            raise unsupported('params.json', name, settings)
    if unknown:
        log.warning('params.json: %s not known, and ignored', ', '.join(sorted(unknown)))


def _hidden(settings: Mapping[str, Any], dim: int) -> int:
    """Hidden units, as Mistral writes them; or two thirds of 4 dim, times the multiplier, rounded
    up."""
    if settings.get('hidden_dim') is not None:
        return count(settings, 'hidden_dim', 'params.json')
    hidden = int(2 * 4 * dim / 3)
    if settings.get('ffn_dim_multiplier') is not None:
        hidden = int(number(settings, 'ffn_dim_multiplier', 'params.json') * hidden)
    multiple_of = count(settings, 'multiple_of', 'params.json')
    return multiple_of * -(-hidden // multiple_of)


def params_from_meta(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Stacked float32 parameters from Meta's tensors by name; see `tensors.to_params`."""
    return convert_params.to_params(META, tensors, config)


def params_to_meta(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Meta's tensors by name, float32, from stacked parameters. A tied head is written out."""
    tensors = from_params(META, params, config)
    if config.tied:
        tensors['output.weight'] = tensors['tok_embeddings.weight']
    return tensors

"""Hugging Face's LlamaForCausalLM: config.json and its tensors, both ways."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert import tensors as tensors_lib
from llama_jax.convert.directory import nothing_in, weights
from llama_jax.convert.stored import read_object
from llama_jax.convert.tensors import Scheme, Tensors
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig, RopeScaling
from llama_jax.model.layers import Params

_LAYER = 'model.layers.{i}.'
HUGGING_FACE = Scheme(
    name='Hugging Face Llama',
    table={
        'embed_VD': ('model.embed_tokens.weight', 'V,D'),
        'norm.scale_D': ('model.norm.weight', 'D'),
        'head_VD': ('lm_head.weight', 'V,D'),
        'blocks.attention_norm.scale_D': (_LAYER + 'input_layernorm.weight', 'D'),
        'blocks.attention.q_DNH': (_LAYER + 'self_attn.q_proj.weight', 'NH,D'),
        'blocks.attention.k_DKH': (_LAYER + 'self_attn.k_proj.weight', 'KH,D'),
        'blocks.attention.v_DKH': (_LAYER + 'self_attn.v_proj.weight', 'KH,D'),
        'blocks.attention.out_NHD': (_LAYER + 'self_attn.o_proj.weight', 'D,NH'),
        'blocks.mlp_norm.scale_D': (_LAYER + 'post_attention_layernorm.weight', 'D'),
        'blocks.mlp.gate_DF': (_LAYER + 'mlp.gate_proj.weight', 'F,D'),
        'blocks.mlp.up_DF': (_LAYER + 'mlp.up_proj.weight', 'F,D'),
        'blocks.mlp.down_FD': (_LAYER + 'mlp.down_proj.weight', 'D,F'),
    },
    frequencies=_LAYER + 'self_attn.rotary_emb.inv_freq',
)

_READ = {
    *('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers'),
    *('num_attention_heads', 'num_key_value_heads', 'head_dim', 'max_position_embeddings'),
    *('rms_norm_eps', 'tie_word_embeddings', 'rope_theta', 'rope_scaling', 'rope_parameters'),
}
# The only value that this decoder has of each.
_FIXED = {
    'model_type': 'llama',
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'attention_dropout': 0.0,
    'is_encoder_decoder': False,
    'chunk_size_feed_forward': 0,
}
# Of no consequence for what the weights compute.
_IGNORED = {
    *('bos_token_id', 'eos_token_id', 'pad_token_id', 'dtype', 'torch_dtype', 'use_cache'),
    *('transformers_version', 'initializer_range', 'pretraining_tp', '_name_or_path'),
    *('output_attentions', 'output_hidden_states', 'return_dict', 'id2label', 'label2id'),
}


def config_from_huggingface(settings: Mapping[str, Any]) -> ModelConfig:
    """The architecture that config.json describes (of transformers 4 or 5).

    Raises UserError for every setting that the decoder does not have, known or not.
    """
    for name, value in settings.items():
        if name == 'architectures':
            if value is not None and 'LlamaForCausalLM' not in value:
                raise UserError(f'config.json: architectures = {value!r} has no LlamaForCausalLM')
        elif name in _FIXED:
            if value != _FIXED[name]:
                raise UserError(
                    f'config.json: {name} = {value!r} is not supported, only {_FIXED[name]!r}'
                )
        elif name not in _READ | _IGNORED and value is not None:
            raise UserError(f'config.json: {name} = {value!r} is not supported')
    required = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers')
    for name in (*required, 'num_attention_heads', 'rms_norm_eps', 'max_position_embeddings'):
        if settings.get(name) is None:
            raise UserError(f'config.json: {name} is missing')
    heads, dim = settings['num_attention_heads'], settings['hidden_size']
    theta, scaling = _rope(settings)
    return ModelConfig(
        vocab=settings['vocab_size'],
        dim=dim,
        layers=settings['num_hidden_layers'],
        heads=heads,
        kv_heads=settings.get('num_key_value_heads') or heads,
        head_dim=settings.get('head_dim') or dim // heads,
        ffn=settings['intermediate_size'],
        context=settings['max_position_embeddings'],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=settings['rms_norm_eps'],
        tied=settings.get('tie_word_embeddings') or False,
    )


def _rope(settings: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Version 5 keeps all in 'rope_parameters'; version 4 has 'rope_theta' and 'rope_scaling'."""
    home = 'rope_parameters' if settings.get('rope_parameters') else 'rope_scaling'
    rope = dict(settings.get(home) or {})
    theta = rope.pop('rope_theta', settings.get('rope_theta') or 1e4)
    kind = rope.pop('rope_type', rope.pop('type', 'default'))
    scaling = None
    if kind == 'llama3':
        names = ('factor', 'low_freq_factor', 'high_freq_factor')
        for name in (*names, 'original_max_position_embeddings'):
            if name not in rope:
                raise UserError(f'config.json: {home}.{name} is missing')
        factor, low, high = (float(rope.pop(name)) for name in names)
        original = rope.pop('original_max_position_embeddings')
        scaling = RopeScaling(factor=factor, low=low, high=high, original_context=original)
    elif kind != 'default':
        raise UserError(
            f'config.json: {home}.rope_type = {kind!r} is not supported, only default and llama3'
        )
    for name, value in rope.items():
        if value is not None:
            raise UserError(f'config.json: {home}.{name} = {value!r} is not supported')
    return float(theta), scaling


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """config.json of `config`, for transformers 5. Dropout is training's and is not written."""
    tensors_lib.check_llama(config)
    rope: dict[str, Any] = {'rope_type': 'default', 'rope_theta': config.rope_theta}
    if config.rope_scaling:
        rope |= {
            'rope_type': 'llama3',
            'factor': config.rope_scaling.factor,
            'low_freq_factor': config.rope_scaling.low,
            'high_freq_factor': config.rope_scaling.high,
            'original_max_position_embeddings': config.rope_scaling.original_context,
        }
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'hidden_act': 'silu',
        'vocab_size': config.vocab,
        'hidden_size': config.dim,
        'intermediate_size': config.ffn,
        'num_hidden_layers': config.layers,
        'num_attention_heads': config.heads,
        'num_key_value_heads': config.kv_heads,
        'head_dim': config.head_dim,
        'max_position_embeddings': config.context,
        'rms_norm_eps': config.norm_eps,
        'tie_word_embeddings': config.tied,
        'attention_bias': False,
        'mlp_bias': False,
        'rope_parameters': rope,
    }


def params_from_huggingface(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Stacked float32 parameters from a state dict; see `tensors.to_params` for what it refuses."""
    return tensors_lib.to_params(HUGGING_FACE, tensors, config)


def params_to_huggingface(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The state dict, float32, of stacked parameters. A tied head is left out, as there."""
    return tensors_lib.from_params(HUGGING_FACE, params, config)


def read(directory: Path) -> tuple[ModelConfig, Tensors]:
    """Settings and tensors of a directory of config.json and weights, of which none is read yet.

    Raises UserError when a file is missing or damaged, or the model is not supported.
    """
    path = directory / 'config.json'
    if not os.path.lexists(path):
        raise nothing_in(directory, 'config.json')
    return config_from_huggingface(read_object(path)), weights(directory)


def load(directory: Path) -> tuple[ModelConfig, Params]:
    """Settings and parameters (numpy, on the host) of a directory; few tensors are read at a time.
    Raises UserError as `read` does."""
    config, tensors = read(directory)
    return config, params_from_huggingface(tensors, config)


def save(directory: Path, config: ModelConfig, params: Params) -> None:
    """Write config.json and model.safetensors (float32). Needs the extra `convert`."""
    from safetensors.numpy import save_file  # type: ignore[import-not-found]  # an extra

    directory.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(config_to_huggingface(config), indent=2)
    (directory / 'config.json').write_text(settings + '\n', encoding='utf-8')
    tensors = params_to_huggingface(params, config)
    save_file(tensors, directory / 'model.safetensors', metadata={'format': 'pt'})

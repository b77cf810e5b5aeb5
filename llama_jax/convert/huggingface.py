"""Hugging Face's LlamaForCausalLM: its tensors, both ways, and directories of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llama_jax.convert import params as convert_params
from llama_jax.convert.directory import nothing_in, weights
from llama_jax.convert.huggingface_config import config_from_huggingface
from llama_jax.convert.renamed import from_params
from llama_jax.convert.stored import read_object
from llama_jax.convert.tensors import Scheme, Tensors
from llama_jax.model.config import ModelConfig
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
    tied='"tie_word_embeddings": true in config.json',
)


def params_from_huggingface(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Stacked float32 parameters from a state dict; see `tensors.to_params` for what it refuses."""
    return convert_params.to_params(HUGGING_FACE, tensors, config)


def params_to_huggingface(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The state dict, float32, of stacked parameters. A tied head is left out, as there."""
    return from_params(HUGGING_FACE, params, config)


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

"""GGUF files of the architecture `llama`, quantised or not, in one part or in several.

Queries and keys are in the interleaved order of Meta's files. Quantised tensors are dequantised to
float32, the others have the type of the file. Needs the extra `weights` (`gguf`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert import gguf_rope
from llama_jax.convert import params as convert_params
from llama_jax.convert.gguf_file import File, read
from llama_jax.convert.meta import half_split, interleaved
from llama_jax.convert.tensors import Scheme
from llama_jax.convert.values import at, count, number, short
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params

log = logging.getLogger(__name__)

_WHERE = 'GGUF: llama'
_EPS = 'attention.layer_norm_rms_epsilon'
_LAYER = 'blk.{i}.'
GGUF = Scheme(
    name='GGUF llama',
    table={
        'embed_VD': ('token_embd.weight', 'V,D'),
        'norm.scale_D': ('output_norm.weight', 'D'),
        'head_VD': ('output.weight', 'V,D'),
        'blocks.attention_norm.scale_D': (_LAYER + 'attn_norm.weight', 'D'),
        'blocks.attention.q_DNH': (_LAYER + 'attn_q.weight', 'NH,D'),
        'blocks.attention.k_DKH': (_LAYER + 'attn_k.weight', 'KH,D'),
        'blocks.attention.v_DKH': (_LAYER + 'attn_v.weight', 'KH,D'),
        'blocks.attention.out_NHD': (_LAYER + 'attn_output.weight', 'D,NH'),
        'blocks.mlp_norm.scale_D': (_LAYER + 'ffn_norm.weight', 'D'),
        'blocks.mlp.gate_DF': (_LAYER + 'ffn_gate.weight', 'F,D'),
        'blocks.mlp.up_DF': (_LAYER + 'ffn_up.weight', 'F,D'),
        'blocks.mlp.down_FD': (_LAYER + 'ffn_down.weight', 'D,F'),
    },
    to_pairs=interleaved,
    from_pairs=half_split,
)

_READ = gguf_rope.KEYS | {
    *('vocab_size', 'embedding_length', 'block_count', 'feed_forward_length'),
    *('attention.head_count', 'attention.head_count_kv', 'attention.key_length'),
    *('attention.value_length', _EPS, 'rope.dimension_count'),
}
# What this decoder has of each, besides 0, by which files leave a thing out.
_FIXED: dict[str, tuple[Any, ...]] = {
    'attention.causal': (True,),
    'logit_scale': (1.0,),
    'residual_scale': (1.0,),
    'embedding_scale': (1.0,),
}
# Of no consequence for what the weights compute. Experts have none where their number is 0.
_IGNORED = {
    *('tensor_data_layout', 'rope.scaling.finetuned', 'decoder_start_token_id', 'pooling_type'),
    *('attention.layer_norm_epsilon', 'expert_used_count', 'expert_feed_forward_length'),
}


def load(path: Path) -> tuple[ModelConfig, Params, Mapping[str, Any]]:
    """Architecture, parameters (numpy, on the host) and all settings of the file at `path`.

    Raises UserError when the file is damaged or holds what the decoder does not have.
    """
    file = read(path)
    config = config_from_gguf(file)
    return config, params_from_gguf(file.tensors, config), file.settings


def config_from_gguf(file: File) -> ModelConfig:
    """The architecture of `file`. Raises UserError for every setting that means something which the
    decoder does not have; warns of those that nobody knows."""
    architecture = file.settings.get('general.architecture')
    if architecture != 'llama':
        raise UserError(
            f'GGUF: general.architecture = {short(architecture)} is not supported: llama is'
        )
    own = {
        name.removeprefix('llama.'): value
        for name, value in file.settings.items()
        if name.startswith('llama.')
    }
    for name, value in own.items():
        if name in _READ | _IGNORED:
            continue
        if name not in _FIXED and name not in _known_elsewhere():
            log.warning(
                'GGUF: llama.%s = %s is not known here, and passed over', name, short(value)
            )
        elif value not in _FIXED.get(name, (0,)) and (value != 0 or name == 'attention.causal'):
            raise UserError(f'GGUF: llama.{name} = {short(value)} is not supported')

    def get(name: str, default: int | None = None) -> int:
        return count(_of_all_layers(own, name), name, _WHERE, default)

    tokens = file.settings.get('tokenizer.ggml.tokens')
    dim, heads = get('embedding_length'), get('attention.head_count')
    head_dim = get('attention.key_length', dim // heads)
    for name in ('attention.value_length', 'rope.dimension_count'):
        if get(name, head_dim) != head_dim:
            raise UserError(
                f'{at(_WHERE, name)} = {own[name]} is not supported, only the head '
                f'dimension {head_dim}'
            )
    rope = gguf_rope.from_gguf(own, file.rope_factors, head_dim=head_dim)
    return ModelConfig(
        vocab=get('vocab_size', len(tokens) if isinstance(tokens, list) and tokens else None),
        dim=dim,
        layers=get('block_count'),
        heads=heads,
        kv_heads=get('attention.head_count_kv', heads),
        head_dim=head_dim,
        ffn=get('feed_forward_length'),
        context=rope.context,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        norm_eps=gguf_rope.as_written(number(_of_all_layers(own, _EPS), _EPS, _WHERE)),
        tied='output.weight' not in file.tensors,
    )


def _of_all_layers(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A setting, by its name, that some files give for each layer. Raises UserError where these
    differ."""
    value = settings.get(name)
    if isinstance(value, list):
        if len(set(map(str, value))) != 1:
            raise UserError(f'{at(_WHERE, name)} differs from layer to layer: {value}')
        value = value[0]
    return {name: value}


def params_from_gguf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Stacked float32 parameters from tensors by name; see `tensors.to_params`."""
    return convert_params.to_params(GGUF, tensors, config)


@functools.cache
def _known_elsewhere() -> frozenset[str]:
    """Settings that some architecture has, without its name: those do something."""
    from gguf.constants import Keys

    found: list[str] = []
    rooms: list[Any] = [Keys]
    for room in rooms:
        for value in vars(room).values():
            if isinstance(value, type):
                rooms.append(value)
            elif isinstance(value, str) and value.startswith('{arch}.'):
                found.append(value.removeprefix('{arch}.'))
    return frozenset(found)

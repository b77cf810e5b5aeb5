"""GGUF files of the architecture `llama`, quantised or not.

Queries and keys are in the interleaved order of Meta's files. Every tensor is dequantised to
float32. Needs the extra `weights` (`gguf`), which dequantises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert import gguf_header
from llama_jax.convert import tensors as tensors_lib
from llama_jax.convert.meta import half_split, interleaved
from llama_jax.convert.tensors import Scheme, Tensors
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig, RopeScaling
from llama_jax.model.layers import Params
from llama_jax.model.rope import frequencies

_LAYER = 'blk.{i}.'
_ROPE_FACTORS = 'rope_freqs.weight'
_ROW = 2**14
"""A sixteenth of the entries that are dequantised at a time."""
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
    frequencies=_LAYER + 'attn_rot_embd.weight',
    to_pairs=interleaved,
    from_pairs=half_split,
)

_READ = {
    *('vocab_size', 'context_length', 'embedding_length', 'block_count', 'feed_forward_length'),
    *('attention.head_count', 'attention.head_count_kv', 'attention.key_length'),
    *('attention.value_length', 'attention.layer_norm_rms_epsilon', 'rope.dimension_count'),
    *('rope.freq_base', 'rope.scaling.original_context_length'),
}
# The only value that this decoder has of each.
_FIXED = {
    'rope.scaling.type': 'none',
    'rope.scaling.factor': 1.0,
    'rope.scale_linear': 1.0,
    'expert_count': 0,
    'expert_used_count': 0,
    'attention.causal': True,
    'use_parallel_residual': False,
}
# Of no consequence for what the weights compute.
_IGNORED = {'tensor_data_layout', 'rope.scaling.finetuned'}


@dataclass(frozen=True)
class File:
    """What a GGUF file holds."""

    settings: Mapping[str, Any]
    """Plain values and lists by key."""
    tensors: Tensors
    """Float32, each dequantised when asked for."""
    rope_factors_h: np.ndarray | None
    """What the rotary frequencies are divided by, [H/2]; how files of Llama 3.1 stretch them."""


def read(path: Path) -> File:
    """The file at `path`. Raises UserError when it is no whole GGUF file."""
    if not path.is_file():
        raise UserError(f'{path} is missing: name a .gguf file')
    try:
        data = np.asarray(np.memmap(path, mode='r'))
        settings, infos = gguf_header.parse(data.data)
        tensors = {info.name: _tensor(data, info) for info in infos}
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f'{path} is no whole GGUF file ({error}): copy it again from where it came'
        ) from None
    n_parts = settings.get('split.count', 0)
    if n_parts not in (0, 1):
        raise UserError(f'{path} is one of {n_parts} parts: merge them first')
    rope_factors = tensors.pop(_ROPE_FACTORS, None)
    shapes = {info.name: info.shape for info in infos}
    return File(settings, _Lazy(tensors, shapes), None if rope_factors is None else rope_factors())


def _tensor(data: np.ndarray, info: gguf_header.Info) -> Callable[[], np.ndarray]:
    """Float32 when called."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(info.kind)
    except ValueError:
        raise _unreadable(info.name, str(info.kind)) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = math.prod(info.shape) // block
    end = info.start + n_blocks * block_bytes
    if (info.shape and info.shape[-1] % block) or end > len(data):
        raise ValueError(f'tensor {info.name!r} is cut off')

    def float32() -> np.ndarray:
        # Rows of another length than those of the matrix: the package takes 16 at a time.
        row = math.gcd(n_blocks, _ROW // block)
        raw = data[info.start : end].reshape(n_blocks // row, row * block_bytes)
        try:
            found = dequantize(raw, kind)
        except NotImplementedError:
            raise _unreadable(info.name, kind.name) from None
        # Float32 is given as it lies in the file, which may change.
        is_view = kind == GGMLQuantizationType.F32
        return found.astype(np.float32, copy=is_view).reshape(info.shape)

    return float32


def _unreadable(name: str, kind: str) -> UserError:
    return UserError(
        f'GGUF: tensor {name!r} is of type {kind}, which cannot be read: take the model in another '
        'quantisation, such as Q8_0, or a newer package gguf'
    )


def load(path: Path) -> tuple[ModelConfig, Params, Mapping[str, Any]]:
    """Architecture, parameters (numpy, on the host) and all settings of the file at `path`.

    Raises UserError when the file is damaged or holds what the decoder does not have.
    """
    file = read(path)
    config = config_from_gguf(file)
    return config, params_from_gguf(file.tensors, config), file.settings


def config_from_gguf(file: File) -> ModelConfig:
    """The architecture of `file`. Raises UserError for every setting that the decoder does not
    have, known or not."""
    architecture = file.settings.get('general.architecture')
    if architecture != 'llama':
        raise UserError(f'GGUF: general.architecture = {architecture!r} is not supported: llama is')
    own = {
        name.removeprefix('llama.'): value
        for name, value in file.settings.items()
        if name.startswith('llama.')
    }
    for name, value in own.items():
        if name in _FIXED:
            if value != _FIXED[name]:
                raise UserError(
                    f'GGUF: llama.{name} = {value!r} is not supported, only {_FIXED[name]!r}'
                )
        elif name not in _READ | _IGNORED:
            raise UserError(f'GGUF: llama.{name} = {value!r} is not supported')

    def get(name: str, default: Any = None) -> Any:
        value = own.get(name, default)
        if value is None:
            raise UserError(f'GGUF: llama.{name} is missing')
        if isinstance(value, list):  # one value per layer
            if len(set(map(str, value))) != 1:
                raise UserError(f'GGUF: llama.{name} differs from layer to layer: {value}')
            value = value[0]
        if isinstance(value, bool | str) or not 0 < value < math.inf:
            raise UserError(f'GGUF: llama.{name} = {value!r} is no positive number')
        return value

    tokens = file.settings.get('tokenizer.ggml.tokens')
    dim, heads = get('embedding_length'), get('attention.head_count')
    head_dim = get('attention.key_length', dim // heads)
    for name in ('attention.value_length', 'rope.dimension_count'):
        if get(name, head_dim) != head_dim:
            raise UserError(
                f'GGUF: llama.{name} = {own[name]} is not supported, only the head '
                f'dimension {head_dim}'
            )
    theta = _as_written(get('rope.freq_base', 1e4))
    return ModelConfig(
        vocab=get('vocab_size', len(tokens) if isinstance(tokens, list) and tokens else None),
        dim=dim,
        layers=get('block_count'),
        heads=heads,
        kv_heads=get('attention.head_count_kv', heads),
        head_dim=head_dim,
        ffn=get('feed_forward_length'),
        context=get('context_length'),
        rope_theta=theta,
        rope_scaling=_scaling(
            file.rope_factors_h,
            head_dim=head_dim,
            theta=theta,
            original_context=get('rope.scaling.original_context_length', 8192),
        ),
        norm_eps=_as_written(get('attention.layer_norm_rms_epsilon')),
        tied='output.weight' not in file.tensors,
    )


def params_from_gguf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Stacked float32 parameters from tensors by name; see `tensors.to_params`."""
    return tensors_lib.to_params(GGUF, tensors, config)


def _as_written(value: float) -> float:
    """Files hold float32: 1e-5 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(
    factors_h: np.ndarray | None, *, head_dim: int, theta: float, original_context: int
) -> RopeScaling | None:
    """The rule behind the factors of a file, which holds no more than these."""
    if factors_h is None or np.all(factors_h == 1):
        return None
    rule = RopeScaling(factor=float(factors_h.max()), original_context=original_context)
    plain, stretched = (
        np.asarray(frequencies(head_dim, theta=theta, scaling=scaling)) for scaling in (None, rule)
    )
    expected = plain / stretched
    if factors_h.shape != expected.shape or not np.allclose(factors_h, expected, rtol=1e-3):
        raise UserError(
            f"GGUF: tensor {_ROPE_FACTORS!r} is not Llama 3's rule for {rule}: no other is "
            'supported'
        )
    return rule


class _Lazy(Tensors):
    """Float32 arrays that are made when asked for."""

    def __init__(
        self,
        make: Mapping[str, Callable[[], np.ndarray]],
        shapes: Mapping[str, tuple[int, ...]],
    ):
        self._make, self._shapes = make, shapes

    def __getitem__(self, name: str) -> np.ndarray:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

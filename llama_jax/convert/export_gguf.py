"""A GGUF file that llama.cpp loads, written tensor by tensor. Needs the extra `weights`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_jax.convert import gguf_rope, whole
from llama_jax.convert.export_huggingface import KINDS, cast
from llama_jax.convert.stored import FLOATS
from llama_jax.convert.tensors import Tensors, check_llama
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig

Dtype = Literal['float32', 'bfloat16', 'float16', 'q8_0']
_KINDS: dict[str, str] = dict([*KINDS.items(), ('q8_0', 'Q8_0')])
_FILE_TYPES = {'F32': 0, 'F16': 1, 'Q8_0': 7, 'BF16': 32}
"""What most tensors of a file are, by llama.cpp's numbers."""


def write(
    out: Path,
    config: ModelConfig,
    tensors: Tensors,
    *,
    dtype: Dtype,
    name: str,
    vocabulary: Mapping[str, Any],
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the model to the file `out`, whole or not at all; see `whole.written`.

    Vectors are float32, as llama.cpp wants them; matrices whose rows are no multiple of 32 cannot
    be q8_0 and are float16.

    Args:
      tensors: under GGUF's names, rows of tokens only; read one at a time.
      dtype: of the matrices.
      vocabulary: settings `tokenizer.*`, with a token for every row.
      progress: is told how many bytes were written.

    Raises UserError where a tensor holds what is not finite, or what its type cannot hold.
    """
    import gguf

    settings = settings_of(config)
    writer = gguf.GGUFWriter(None, 'llama')
    general = {'general.type': 'model', 'general.name': name}
    for key, value in (general | settings | dict(vocabulary)).items():
        _add(writer, key, value)
    writer.add_file_type(_FILE_TYPES[_KINDS[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _, rope = gguf_rope.to_gguf(config)
    shapes = {key: w.shape for key, w in rope.items()} | {k: tensors.shape(k) for k in tensors}
    kinds = {key: _kind(shape, dtype) for key, shape in shapes.items()}
    size = 0
    for key, kind in kinds.items():
        number = gguf.GGMLQuantizationType[kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[number]
        n = math.prod(shapes[key]) // block * block_bytes
        writer.add_tensor_info(key, shapes[key], np.dtype(np.float32), n, raw_dtype=number)
        size += n
    with whole.written(out, size=size) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        with file:
            for key, kind in kinds.items():
                content = _bytes(key, rope[key] if key in rope else tensors[key], kind)
                # Not by the package, whose error for a full disk says nothing of it.
                file.write(bytes(-file.tell() % writer.data_alignment))
                file.write(content)
                progress(len(content))
            file.write(bytes(-file.tell() % writer.data_alignment))


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """Settings `llama.*`. Raises UserError for what GGUF files of that architecture cannot say."""
    check_llama(config)
    rope, _ = gguf_rope.to_gguf(config)
    return {
        'llama.vocab_size': config.ids,
        'llama.embedding_length': config.dim,
        'llama.block_count': config.layers,
        'llama.feed_forward_length': config.ffn,
        'llama.attention.head_count': config.heads,
        'llama.attention.head_count_kv': config.kv_heads,
        'llama.attention.key_length': config.head_dim,
        'llama.attention.value_length': config.head_dim,
        'llama.attention.layer_norm_rms_epsilon': float(config.norm_eps),
        'llama.rope.dimension_count': config.head_dim,
        **{f'llama.{name}': value for name, value in rope.items()},
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        raise UserError(f'GGUF: {key} = {value!r} cannot be written')


def _kind(shape: tuple[int, ...], dtype: Dtype) -> str:
    if len(shape) == 1:
        return 'F32'
    return 'F16' if dtype == 'q8_0' and shape[-1] % 32 else _KINDS[dtype]


def _bytes(name: str, w: np.ndarray, kind: str) -> memoryview:
    import gguf

    if kind in FLOATS:
        found = cast(name, w, FLOATS[kind], kind)
    else:
        w = cast(name, w, np.dtype(np.float32), 'float32')
        cast(name, w / 127, np.dtype(np.float16), 'q8_0')  # as large as the scale of a block is
        found = gguf.quantize(w, gguf.GGMLQuantizationType[kind])
    return np.ascontiguousarray(found).reshape(-1).view(np.uint8).data

"""A directory that `transformers` loads, written tensor by tensor: config.json, safetensors in
shards, generation_config.json and the files of a tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_jax.convert import whole
from llama_jax.convert.huggingface_config import config_to_huggingface
from llama_jax.convert.stored import FLOATS
from llama_jax.convert.tensors import Tensors
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.text.special import Special

Dtype = Literal['float32', 'bfloat16', 'float16']
KINDS: dict[Dtype, str] = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
"""Names in a file of safetensors; see FLOATS for numpy's types."""


def write(
    out: Path,
    config: ModelConfig,
    tensors: Tensors,
    *,
    dtype: Dtype,
    ids: Special,
    files: Mapping[str, bytes],
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the model to the directory `out`, whole or not at all; see `whole.written`.

    Args:
      tensors: under the names of Hugging Face's files, rows of tokens only; read one at a time.
      dtype: of every tensor.
      files: of the tokenizer, by name.
      shard_bytes: a file of tensors has no more, unless one tensor has.
      progress: is told how many bytes were written.

    Raises UserError where a tensor holds what is not finite, or what `dtype` cannot hold.
    """
    settings = config_to_huggingface(config)
    special = {'bos_token_id': ids.bos_id, 'eos_token_id': _one_or_all(ids.ends)}
    if ids.pad_id is not None and ids.pad_id < config.ids:
        special['pad_token_id'] = ids.pad_id
    settings |= {'vocab_size': config.ids, **special, 'dtype': dtype, 'torch_dtype': dtype}
    shards = _shards(tensors, dtype, shard_bytes)
    size = sum(map(math.prod, map(tensors.shape, tensors))) * FLOATS[KINDS[dtype]].itemsize
    with whole.written(out, size=size, directory=True) as partial:
        homes: dict[str, str] = {}
        for i, names in enumerate(shards, 1):
            home = f'model-{i:05}-of-{len(shards):05}.safetensors'
            if len(shards) == 1:
                home = 'model.safetensors'
            write_shard(partial / home, names, tensors, dtype, progress)
            homes |= dict.fromkeys(names, home)
        if len(shards) > 1:
            index = {'metadata': {'total_size': size}, 'weight_map': homes}
            write_json(partial / 'model.safetensors.index.json', index)
        write_json(partial / 'config.json', settings)
        write_json(partial / 'generation_config.json', special)
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)


def own_dtype(tensors: Tensors) -> Dtype:
    """The type of the tensors; float32 where they are mixed, for it holds them all."""
    found = {tensors.dtype(name) for name in tensors}
    return next((name for name, kind in KINDS.items() if {FLOATS[kind]} == found), 'float32')


def cast(name: str, w: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """`w` in another type, which is called `what`; rounded to nearest. Raises UserError for what is
    not finite, before or after."""
    if not np.isfinite(w).all():
        raise UserError(
            f'tensor {name!r} holds numbers that are not finite: export another checkpoint, or '
            'copy the weights again'
        )
    with np.errstate(over='ignore'):
        found = w.astype(dtype, copy=False)
    if not np.isfinite(found).all():
        most = float(np.abs(w.astype(np.float32)).max())
        raise UserError(
            f'tensor {name!r} holds {most:g}, which {what} does not reach: give --dtype bfloat16 '
            'or float32'
        )
    return found


def _one_or_all(ids: Sequence[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def _shards(tensors: Tensors, dtype: Dtype, most: int) -> list[list[str]]:
    """Names of the tensors of each file, in their order."""
    shards: list[list[str]] = [[]]
    n = 0
    for name in tensors:
        size = math.prod(tensors.shape(name)) * FLOATS[KINDS[dtype]].itemsize
        if shards[-1] and n + size > most:
            shards.append([])
            n = 0
        shards[-1].append(name)
        n += size
    return shards


def write_shard(
    path: Path,
    names: Sequence[str],
    tensors: Tensors,
    dtype: Dtype,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """A file of safetensors: the library's own writer wants all tensors in memory."""
    kind, numpy_type = KINDS[dtype], FLOATS[KINDS[dtype]]
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    at = 0
    for name in names:
        shape = tensors.shape(name)
        end = at + math.prod(shape) * numpy_type.itemsize
        header[name] = {'dtype': kind, 'shape': shape, 'data_offsets': (at, end)}
        at = end
    head = json.dumps(header).encode()
    head += b' ' * (-len(head) % 8)  # tensors begin at a multiple of 8, as the format demands
    with path.open('wb') as file:
        file.write(len(head).to_bytes(8, 'little') + head)
        for part in _bytes(names, tensors, dtype):
            file.write(part)
            progress(len(part))


def _bytes(names: Sequence[str], tensors: Tensors, dtype: Dtype) -> Iterator[memoryview]:
    for name in names:
        w = cast(name, tensors[name], FLOATS[KINDS[dtype]], dtype)
        yield np.ascontiguousarray(w).reshape(-1).view(np.uint8).data


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file of settings."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')

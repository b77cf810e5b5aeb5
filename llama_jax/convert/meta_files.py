"""Directories as Meta releases them: params.json beside consolidated.00.pth and so on, or beside
consolidated.safetensors, as Mistral does.

A large model is in several parts, made to run in parallel: each holds some rows of a matrix or some
columns, as the kind of the matrix says (column- and row-parallel layers of fairscale).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert.directory import indexed, is_huggingface, of_files
from llama_jax.convert.meta import check, config_from_meta
from llama_jax.convert.stored import Stored, missing_files, read_object
from llama_jax.convert.stored import read as read_place
from llama_jax.convert.tensors import Tensors
from llama_jax.convert.values import count, number
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig

_SETTINGS = 'params.json'
_ONE = 'consolidated.safetensors'
_INDEX = 'consolidated.safetensors.index.json'
_PART = re.compile(r'consolidated\.(\d\d)\.pth')
_AXIS = {
    **dict.fromkeys(('wq', 'wk', 'wv', 'w1', 'w3', 'output'), 0),
    **dict.fromkeys(('wo', 'w2'), 1),
}
"""What the parts of a matrix are: its rows, or its columns. All parts hold the whole of a norm."""
_EMBEDDING, _HEAD = 'tok_embeddings.weight', 'output.weight'
_LIKE = 64
"""Rows of embedding and head that are compared: equal ones are one tensor written twice."""

_LLAMA3_VOCAB = 128256
_SCALED = {
    (4096, 32): 8.0,
    (8192, 80): 8.0,
    (16384, 126): 8.0,
    (2048, 16): 32.0,
    (3072, 28): 32.0,
    (2048, 12): 32.0,
}
"""(dim, layers) of Llama 3.1 and 3.3, 3.2 and Guard 3 1B -> factor of the rope scaling."""
_CONTEXTS: Sequence[tuple[Mapping[str, Any], int]] = (
    ({'use_scaled_rope': True}, 131072),
    ({'vocab_size': _LLAMA3_VOCAB, 'rope_theta': 5e5}, 8192),
    ({'hidden_dim': 14336, 'dim': 4096, 'n_layers': 32}, 32768),
    *(
        ({'vocab_size': vocab, 'rope_theta': 1e6, 'hidden_dim': None}, 16384)
        for vocab in (32000, 32016)
    ),
    ({'vocab_size': 32016, 'rope_theta': 1e4}, 4096),
    ({'vocab_size': 32000, 'rope_theta': 1e4, 'norm_eps': 1e-6}, 2048),
    ({'vocab_size': 32000, 'rope_theta': 1e4, 'dim': 8192, 'n_kv_heads': None}, 2048),
    ({'vocab_size': 32000, 'rope_theta': 1e4, 'hidden_dim': None}, 4096),
)
"""Settings of Llama 3.1 to 3.3, Llama 3, Mistral 7B, Code Llama, its 70B for instructions, LLaMA 1,
its 65B, and Llama 2 -> the context, which params.json does not say. The first that fits counts."""


def is_meta(directory: Path) -> bool:
    """Whether the directory has params.json and weights that go with it, and no others: Mistral's
    have Hugging Face's files as well, which say more."""
    if not os.path.lexists(directory / _SETTINGS) or is_huggingface(directory):
        return False
    return os.path.lexists(directory / _INDEX) or bool(_weights(directory))


def read(directory: Path) -> tuple[ModelConfig, Tensors]:
    """Settings and tensors, of which hardly anything is read yet.

    Raises UserError when a file is missing or damaged, or the model is not supported.
    """
    settings = read_object(directory / _SETTINGS)
    check(settings)
    if os.path.lexists(directory / _INDEX):
        parts = [indexed(directory, _INDEX)]
    else:
        parts = [of_files([path]) for path in _weights(directory)]
    for part in parts:
        if _EMBEDDING not in part.places:
            path = next(iter(part.places.values())).path if part.places else directory
            raise UserError(
                f"{path} has no tensor {_EMBEDDING!r}: its tensors are not in Meta's layout, as "
                f'{_SETTINGS} beside it says'
            )
    tensors = Joined(parts, settings.get('dim'))
    vocab = tensors.shape(_EMBEDDING)[0]
    stated, rows = settings.get('vocab_size'), parts[0].shape(_EMBEDDING)[0]
    if isinstance(stated, int) and stated > vocab and rows and not stated % rows:
        raise _other_number(directory, parts, stated / rows)
    config = config_from_meta(
        settings,
        vocab=vocab,
        tied=_tied(parts, settings),
        context=_context(directory, settings, vocab),
        rope_factor=_rope_factor(directory, settings),
    )
    gate = parts[0].places.get('layers.0.feed_forward.w1.weight')
    if gate and gate.shape and gate.shape[0] * len(parts) != config.ffn:
        raise _other_number(directory, parts, config.ffn / max(1, gate.shape[0]))
    return config, tensors


def _other_number(directory: Path, parts: Sequence[Stored], wanted: float) -> UserError:
    return UserError(
        f'{directory} has {len(parts)} files of weights, and by {_SETTINGS} there are '
        f'{wanted:g}: fetch all of them, and no others'
    )


def tokenizer_of(directory: Path) -> Path:
    """Where its tokenizer.model is: beside the weights, or a level above, for several sizes."""
    for place in (directory, directory.resolve().parent):
        if os.path.lexists(place / 'tokenizer.model'):
            return place
    return directory


class Joined(Tensors):
    """The tensors of parts that models ran in parallel, each put together when it is read."""

    def __init__(self, parts: Sequence[Stored], dim: Any):
        """`dim` is that of the model: parts of the embedding are its columns, or its rows."""
        self._parts, self._dim = parts, dim
        for part in parts[1:]:
            if (odd := set(part) ^ set(parts[0])) or any(
                part.shape(name) != parts[0].shape(name) for name in part
            ):
                path = next(iter(part.places.values())).path
                name = min(odd) if odd else 'a tensor'
                raise UserError(
                    f'{path}: {name} is not as in the parts beside it: they are of different models'
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, without reading it."""
        shape, axis = self._parts[0].shape(name), self._axis(name)
        if axis is None:
            return shape
        return tuple(n * len(self._parts) if i == axis else n for i, n in enumerate(shape))

    def dtype(self, name: str) -> np.dtype:
        """Of a tensor, without reading it."""
        return self._parts[0].dtype(name)

    def __getitem__(self, name: str) -> np.ndarray:
        axis = self._axis(name)
        if axis is None:
            return self._parts[0][name]
        whole = np.empty(self.shape(name), self.dtype(name))
        for part, room in zip(self._parts, np.split(whole, len(self._parts), axis), strict=True):
            room[...] = part[name]
        return whole

    def _axis(self, name: str) -> int | None:
        """Along which the parts lie; None where each has all of it."""
        shape = self._parts[0].shape(name)
        if len(self._parts) == 1 or len(shape) != 2:
            return None
        if name == _EMBEDDING:
            return 0 if shape[1] == self._dim else 1
        return _AXIS.get(name.split('.')[-2])


def _weights(directory: Path) -> list[Path]:
    """The files of the parts in their order."""
    found = {
        int(match[1]): path
        for path in directory.glob('consolidated.*')
        if (match := _PART.fullmatch(path.name))
    }
    if not found:
        one = directory / _ONE
        return [one] if os.path.lexists(one) else []
    absent = [f'consolidated.{i:02}.pth' for i in range(max(found)) if i not in found]
    if absent:
        raise missing_files(directory, absent, f'consolidated.{max(found):02}.pth')
    return [found[i] for i in sorted(found)]


def _tied(parts: Sequence[Stored], settings: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding, of which Meta writes a copy and Mistral does not."""
    embedding, head = (parts[0].places.get(name) for name in (_EMBEDDING, _HEAD))
    if embedding is None or head is None:
        return settings.get('tied_embeddings') is True
    rows = min(_LIKE, embedding.shape[0], head.shape[0])
    first, second = (read_place(replace(p, shape=(rows, *p.shape[1:]))) for p in (embedding, head))
    width = min(first.shape[1], second.shape[1])
    return np.array_equal(first[:, :width], second[:, :width])


def _context(directory: Path, settings: Mapping[str, Any], vocab: int) -> int:
    if settings.get('max_seq_len') is not None:
        return count(settings, 'max_seq_len', _SETTINGS)
    known = {'rope_theta': 1e4, **settings, 'vocab_size': vocab}
    for like, context in _CONTEXTS:
        if all(known.get(name) == value for name, value in like.items()):
            return context
    raise UserError(
        f'{directory / _SETTINGS} does not say how long a text may be, and the model is none of '
        'those known here: write it there, such as "max_seq_len": 8192'
    )


def _rope_factor(directory: Path, settings: Mapping[str, Any]) -> float | None:
    if not settings.get('use_scaled_rope'):
        return None
    known = _SCALED.get((settings.get('dim'), settings.get('n_layers')))  # type: ignore[arg-type]
    if known is None and settings.get('rope_scaling_factor') is None:
        raise UserError(
            f'{directory / _SETTINGS}: use_scaled_rope does not say by how much, and the model is '
            'none of those known here: write it there, such as "rope_scaling_factor": 8 (8 for '
            'Llama 3.1 and 3.3, 32 for Llama 3.2)'
        )
    return number(settings, 'rope_scaling_factor', _SETTINGS, known)

"""Tensors of another code base by name <-> our parameters, from a table of names and letters.

Others store each matrix as [outputs, inputs] and fuse heads into one dimension. A table says what a
tensor is called there and which of our letters make up each of its dimensions: 'NH,D' is a matrix
[heads * head dimension, model dimension].
"""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax import layout, trees
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.patterns import Dense
from llama_jax.model.rope import frequencies

_ROTATED = ('.q_DNH', '.k_DKH')


class Tensors(Mapping[str, np.ndarray]):
    """Tensors of a model by name. Each is read when it is asked for, in the type that it has in the
    file; nothing keeps it. Several threads may read at a time."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it. Raises KeyError where there is none."""

    @abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """Of what `self[name]` gives, without reading it; bfloat16 is that of ml_dtypes."""

    def __contains__(self, name: object) -> bool:
        # Not by reading the tensor, as a Mapping would.
        try:
            self.shape(name)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True


class InMemory(Tensors):
    """Arrays that are there already, such as a state dict."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._arrays[name].dtype


Table = Mapping[str, tuple[str, str]]
"""Our dotted name -> (name there, with {i} for the layer; letters of its dimensions)."""


@dataclass(frozen=True)
class Scheme:
    """How another code base names and lays out the parameters of a LLaMA decoder."""

    name: str
    table: Table
    frequencies: str
    """Stored rotary frequencies, with {i} where every layer has its own: checked, then left out."""
    to_pairs: Callable[[np.ndarray], np.ndarray] = lambda w_XHD: w_XHD
    """Our order of a head's dimensions -> theirs, on query and key projections [heads, H, D]."""
    from_pairs: Callable[[np.ndarray], np.ndarray] = lambda w_XHD: w_XHD
    """The inverse of `to_pairs`."""


_THREADS = 4
"""Tensors that are read at a time."""


def check_llama(config: ModelConfig) -> None:
    """Raise UserError unless the architecture is one that files of LLaMA models can describe."""
    if not config.llama or config.pattern != Dense():
        raise UserError(
            'only decoders of the LLaMA family can be converted: norm rms, norm_place pre, mlp '
            'swiglu, no bias, positions rope, pattern Dense and no encoder_layers'
        )


def to_params(scheme: Scheme, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Stacked float32 parameters (numpy, on the host) of `config` from `tensors`.

    Raises UserError when a tensor is missing, left over or of another shape. `tensors` may load its
    entries lazily: up to four are read at a time.
    """
    check_llama(config)
    sizes = _sizes(config)
    unread = dict.fromkeys(tensors)

    def need(theirs: str) -> None:
        if theirs not in tensors:
            raise UserError(f'tensor {theirs!r} is missing: this is no whole {scheme.name} model')

    def read(path: str, theirs: str) -> np.ndarray:
        """With a dimension for each of our letters, in their order."""
        need(theirs)
        unread.pop(theirs)
        groups = scheme.table[path][1]
        w = np.asarray(tensors[theirs]).astype(np.float32, copy=False)
        shape = _fused(groups, sizes)
        if w.shape != shape:
            raise UserError(f'tensor {theirs!r} has shape {w.shape}, the settings say {shape}')
        w = w.reshape([sizes[letter] for letter in groups.replace(',', '')])
        return scheme.from_pairs(w) if path.endswith(_ROTATED) else w

    def leaf(path: str, spec: Any) -> np.ndarray:
        theirs, groups = scheme.table[path]
        letters, apart = layout.letters_of(path, len(spec.shape)), groups.replace(',', '')
        if '{i}' not in theirs:
            return read(path, theirs).transpose([apart.index(letter) for letter in letters])
        need(theirs.format(i=config.layers - 1))  # before room is made for so many layers
        # A view in our order: to turn the numbers around costs less on their way to a device.
        stacked = np.empty([config.layers, *(sizes[letter] for letter in apart)], np.float32)

        def fill(i: int) -> None:
            stacked[i] = read(path, theirs.format(i=i))

        list(pool.map(fill, range(config.layers)))
        return stacked.transpose([('L' + apart).index(letter) for letter in letters])

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        params = trees.map_named(leaf, layers.abstract(config))
    _check_rest(scheme, tensors, list(unread), config, params)
    return params


def from_params(scheme: Scheme, params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Float32 tensors under their names, from stacked parameters. A tied head is left out."""
    check_llama(config)
    sizes = _sizes(config)

    def fused(path: str, w: np.ndarray, letters: str) -> np.ndarray:
        groups = scheme.table[path][1]
        apart = groups.replace(',', '')
        w = w.transpose([letters.index(letter) for letter in apart])
        if path.endswith(_ROTATED):
            w = scheme.to_pairs(w)
        return np.ascontiguousarray(w.reshape(_fused(groups, sizes)))

    tensors = {}
    for path, value in trees.named(params):
        theirs = scheme.table[path][0]
        w = np.asarray(value, np.float32)
        letters = layout.letters_of(path, w.ndim)
        if '{i}' not in theirs:
            tensors[theirs] = fused(path, w, letters)
            continue
        for i in range(config.layers):
            tensors[theirs.format(i=i)] = fused(path, w[i], letters[1:])
    return tensors


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {**config.sizes(), 'H': config.head_dim}


def _fused(groups: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups.split(','))


def _check_rest(
    scheme: Scheme,
    tensors: Mapping[str, np.ndarray],
    rest: list[str],
    config: ModelConfig,
    params: Params,
) -> None:
    """Tensors that hold nothing of their own may stand there, if they hold what they should."""
    if not rest:
        return
    expected = {}
    angles = np.asarray(
        frequencies(config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
    )
    for i in range(config.layers):
        expected[scheme.frequencies.format(i=i)] = angles, 1e-2  # some are stored in bfloat16
    if config.tied:
        expected[scheme.table['head_VD'][0]] = params['embed_VD'], 0.0
    for theirs in rest:
        if theirs not in expected:
            raise UserError(f'tensor {theirs!r} has no place in this architecture')
        value, tolerance = expected[theirs]
        found = np.asarray(tensors[theirs]).astype(np.float32)
        if found.shape != value.shape or not np.allclose(found, value, rtol=tolerance, atol=0):
            raise UserError(f'tensor {theirs!r} is not what the settings of the model say')

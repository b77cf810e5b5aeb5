"""Tensors of another code base by name <-> our parameters, from a table of names and letters.

Others store each matrix as [outputs, inputs] and fuse heads into one dimension. A table says what a
tensor is called there and which of our letters make up each of its dimensions: 'NH,D' is a matrix
[heads * head dimension, model dimension].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.model.patterns import Dense, Window

ROTATED = ('.q_DNH', '.k_DKH')
"""Ends of the paths of projections whose rows a scheme may have in another order."""


class Tensors(Mapping[str, np.ndarray]):
    """Tensors of a model by name. Each is read when it is asked for, in the type that it has in the
    file; nothing keeps it. Several threads may read at a time."""

    def where(self, name: str) -> str:
        """A tensor as messages name it."""
        return f'tensor {name!r}'

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
    to_pairs: Callable[[np.ndarray], np.ndarray] = lambda w_XHD: w_XHD
    """Our order of a head's dimensions -> theirs, on query and key projections [heads, H, D]."""
    from_pairs: Callable[[np.ndarray], np.ndarray] = lambda w_XHD: w_XHD
    """The inverse of `to_pairs`."""
    tied: str = ''
    """How settings there say that the head is the embedding; empty where the files say it."""


def check_llama(config: ModelConfig) -> None:
    """Raise UserError unless the architecture is one that files of LLaMA models can describe."""
    needs: dict[str, Any] = {
        **{'norm': 'rms', 'norm_place': 'pre', 'mlp': 'swiglu', 'bias': False},
        **{'positions': 'rope', 'encoder_layers': 0},
    }
    if not isinstance(config.pattern, Window):
        needs['pattern'] = Dense()
    others = [name for name, value in needs.items() if getattr(config, name) != value]
    if others:
        has = ', '.join(f'{name} {getattr(config, name)}' for name in others)
        raise UserError(
            f'only decoders of the LLaMA family can be converted, and this model has {has}: the '
            f'others have {", ".join(f"{name} {needs[name]}" for name in others)}'
        )


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """Size of each dimension by letter."""
    return {**config.sizes(), 'H': config.head_dim}


def fused(groups: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a tensor there."""
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups.split(','))

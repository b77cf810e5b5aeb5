"""Which tensor of a model is which parameter, decided by names and shapes before numbers are read.

Files differ from their settings in ways that change nothing: a prefix that a training library left,
rows of the embedding beyond the vocabulary, a head that is stored although it is the embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llama_jax.convert import buffers
from llama_jax.convert.tensors import Scheme, Tensors, check_llama, fused, sizes_of
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import TABLES

log = logging.getLogger(__name__)

_EMBEDDING, _HEAD = TABLES
_PART = 2**22
"""Entries that are compared at a time."""


@dataclass(frozen=True)
class Fitted:
    """A model as its tensors have it."""

    config: ModelConfig
    tensors: Tensors
    """By the names of the scheme, without a prefix."""
    names: dict[str, str]
    """Our dotted name, layers in it, -> the name there."""


def fitted(scheme: Scheme, tensors: Tensors, config: ModelConfig) -> Fitted:
    """`tensors` as a model of `config`, whose vocabulary and tied head become those of the files:
    rows of embedding or head that the other lacks, or the settings, are padding; ids without a row
    are left out; a head that is stored beside a tied embedding and differs is one of its own, as
    transformers 5 takes it.

    Raises UserError when tensors are missing, left over or of another shape, and for rotary tables
    that the settings contradict. Of numbers only those tables are read, and a head that may be the
    embedding.
    """
    check_llama(config)
    tensors = _without_prefix(scheme, tensors)
    config, tables = _tied(scheme, tensors, config)
    config = _rows(scheme, tensors, config, tables)
    last = scheme.table['blocks.mlp_norm.scale_D'][0].format(i=config.layers - 1)
    if last not in tensors:  # before so many layers are gone through
        raise _missing(scheme, [last])
    names = {
        path.replace('blocks.', f'blocks.{i}.', 1): theirs.format(i=i)
        for path, (theirs, _) in scheme.table.items()
        if path not in TABLES
        for i in (range(config.layers) if '{i}' in theirs else (0,))
    } | tables
    _check_names(scheme, tensors, config, names)
    _check_shapes(scheme, tensors, config, names)
    buffers.check(filter(buffers.is_buffer, tensors), tensors, config)
    return Fitted(config, tensors, names)


def entry(scheme: Scheme, path: str) -> tuple[str, str]:
    """Of the scheme's table, for a path with the layer in it."""
    first, _, rest = path.partition('.')
    return scheme.table[f'{first}.{rest.partition(".")[2]}' if first == 'blocks' else path]


class _Renamed(Tensors):
    """Tensors whose names are longer by a prefix."""

    def __init__(self, tensors: Tensors, prefix: str):
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._prefix + name)

    def dtype(self, name: str) -> np.dtype:
        return self._tensors.dtype(self._prefix + name)

    def where(self, name: str) -> str:
        return self._tensors.where(self._prefix + name)


def _without_prefix(scheme: Scheme, tensors: Tensors) -> Tensors:
    norm = scheme.table['norm.scale_D'][0]
    if norm in tensors:
        return tensors
    prefix = next((name.removesuffix(norm) for name in tensors if name.endswith('.' + norm)), '')
    if not prefix:
        return tensors
    for name in tensors:
        if not name.startswith(prefix):
            raise UserError(
                f'{tensors.where(name)} does not begin with {prefix!r} as {prefix + norm!r} does: '
                'save the model alone, without what was around it'
            )
    return _Renamed(tensors, prefix)


def _tied(
    scheme: Scheme, tensors: Tensors, config: ModelConfig
) -> tuple[ModelConfig, dict[str, str]]:
    """Whether the head is the embedding, and where these two are."""
    embedding, head = (scheme.table[path][0] for path in TABLES)
    apart = {_EMBEDDING: embedding, _HEAD: head}
    if not config.tied:
        return config, apart
    if head not in tensors:
        return config, {_EMBEDDING: embedding}
    if embedding not in tensors:  # writers that keep shared tensors once may keep either
        return config, {_EMBEDDING: head}
    if _equal(tensors, embedding, head):
        # The one with more rows, for these are the ids that a file has.
        return config, {_EMBEDDING: max(embedding, head, key=lambda name: _n_rows(tensors, name))}
    log.warning(
        '%s differs from %r, though the settings say that the two are one: it is used as it is, as '
        'transformers 5 does',
        *(tensors.where(head), embedding),
    )
    return replace(config, tied=False), apart


def _equal(tensors: Tensors, embedding: str, head: str) -> bool:
    """Whether the rows that both have are equal."""
    one, other = tensors.shape(embedding), tensors.shape(head)
    if one[1:] != other[1:] or not one:
        return False
    n = min(one[0], other[0])
    a, b = tensors[embedding][:n].ravel(), tensors[head][:n].ravel()
    return all(
        np.array_equal(a[i : i + _PART].astype(np.float32), b[i : i + _PART].astype(np.float32))
        for i in range(0, a.size, _PART)
    )


def _n_rows(tensors: Tensors, name: str) -> int:
    shape = tensors.shape(name) if name in tensors else ()
    return shape[0] if shape else 0


def _rows(
    scheme: Scheme, tensors: Tensors, config: ModelConfig, tables: dict[str, str]
) -> ModelConfig:
    """With the vocabulary that the files have."""
    rows = [_n_rows(tensors, name) for name in tables.values()]
    if not all(rows):
        return config  # what is missing is told of next
    ids = min(config.ids, *rows)
    if ids < config.ids:
        log.warning(
            '%s has %d rows, and the settings say %d: ids from %d on have none, and are refused',
            *(tensors.where(tables[_EMBEDDING]), min(rows), config.ids, ids),
        )
    if max(rows) == config.vocab and ids == config.ids:
        return config
    return replace(config, vocab=max(rows), vocab_padding=max(rows) - ids)


def _check_names(
    scheme: Scheme, tensors: Tensors, config: ModelConfig, names: dict[str, str]
) -> None:
    wanted = set(names.values())
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise _missing(scheme, missing)
    passed = {scheme.table[_HEAD][0], scheme.table[_EMBEDDING][0]} if config.tied else set()
    for name in tensors:
        if name not in wanted | passed and not buffers.is_buffer(name):
            remedy = (
                ': merge the adapter into the model first (merge_and_unload of PEFT)'
                if '.lora_' in name or '.base_layer.' in name
                else ''
            )
            raise UserError(f'{tensors.where(name)} has no place in this architecture{remedy}')


def _missing(scheme: Scheme, names: list[str]) -> UserError:
    more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
    remedy = ''
    if names == [scheme.table[_HEAD][0]]:
        remedy = f'; if it is the embedding, say {scheme.tied}' if scheme.tied else ''
    return UserError(
        f'tensor {names[0]!r} is missing{more}: this is no whole {scheme.name} model{remedy}'
    )


def _check_shapes(
    scheme: Scheme, tensors: Tensors, config: ModelConfig, names: dict[str, str]
) -> None:
    for path, theirs in names.items():
        groups = entry(scheme, path)[1]
        shape, wanted = tensors.shape(theirs), fused(groups, sizes_of(config))
        if path in TABLES and len(shape) == 2:
            wanted = shape[0], wanted[1]  # rows that are missing are padding
        if shape != wanted:
            raise UserError(f'{tensors.where(theirs)} has shape {shape}, the settings say {wanted}')
        dtype = tensors.dtype(theirs)
        if not (np.issubdtype(dtype, np.floating) or dtype.name == 'bfloat16'):
            raise UserError(
                f'{tensors.where(theirs)} is of type {dtype}, and weights are float32, float16 or '
                'bfloat16: take the weights that are not quantised'
            )

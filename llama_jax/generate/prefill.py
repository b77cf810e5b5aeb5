"""The prompts of a batch into a cache: padded to few shapes, read piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from llama_jax.errors import UserError
from llama_jax.generate.programs import Programs, bucket, power_of_two
from llama_jax.mesh import batch_shards
from llama_jax.model.cache import Cache, slots_needed


@dataclass(frozen=True)
class Shape:
    """Sizes that programs are compiled for."""

    rows: int
    prompt: int
    """Padded length of the prompts."""
    piece: int
    """Tokens of the prompts that are read at a time."""
    slots: int
    """Tokens that a row of the cache has room for."""
    source: int = 0
    """Padded length of the sources, of an encoder-decoder."""


def shape_of(
    programs: Programs,
    *,
    prompts: int,
    longest: int,
    max_tokens: int,
    prefill_chunk: int,
    source: int = 0,
) -> Shape:
    """What a batch is padded to: rows to a power of two times the mesh's batch shards, prompts and
    sources to a power of two; prompts to whole pieces of `prefill_chunk` tokens where they are
    longer than one. `source` is the longest, 0 without any."""
    shards = batch_shards(programs.mesh)
    rows = shards * power_of_two(-(-prompts // shards))
    prompt = bucket(longest)
    if prompt > prefill_chunk:
        prompt = -(-longest // prefill_chunk) * prefill_chunk
    piece = min(prompt, prefill_chunk)
    needed = slots_needed(programs.config, length=prompt + max_tokens - 1, piece=piece)
    source = min(bucket(source), programs.config.context) if source else 0
    return Shape(rows, prompt, piece, bucket(needed), source)


def prefill(
    programs: Programs,
    prompts: Sequence[Sequence[int]],
    shape: Shape,
    sources: Sequence[Sequence[int]] | None = None,
    *,
    limits: Sequence[int],
) -> tuple[jax.Array, Cache, jax.Array]:
    """Features of each row's last token [B, D], the cache with all prompts and sources, and the
    lengths of the prompts [B], 0 for rows without one. `limits`: how long each text may become."""
    token_BT, length_B = padded(prompts, shape.rows, shape.prompt, programs.model.pad_id)
    length = programs.place(length_B)
    cache = programs.empty(batch=shape.rows, slots=shape.slots)
    if cache.length_B is not None:
        limit_B = np.ones(shape.rows, np.int32)
        limit_B[: len(limits)] = limits
        cache = replace(cache, length_B=programs.place(limit_B))
    if sources is not None:
        read = padded(sources, shape.rows, shape.source, programs.model.pad_id)
        cross = programs.encode(programs.params, *map(programs.place, read))
        cache = replace(cache, cross=cross)
    x_BD = programs.no_features(shape.rows)
    for start in range(0, shape.prompt, shape.piece):
        x_BD, cache = programs.read(
            *(programs.params, cache, x_BD),
            programs.place(token_BT[:, start : start + shape.piece]),
            *(length, start),
            first=start == 0,
        )
    return x_BD, cache, length


def padded(
    rows: Sequence[Sequence[int]], batch: int, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and lengths [B]; rows that are not given have length 0."""
    token_BT = np.full((batch, length), pad_id, np.int32)
    length_B = np.zeros(batch, np.int32)
    for i, row in enumerate(rows):
        token_BT[i, : len(row)] = row
        length_B[i] = len(row)
    return token_BT, length_B


def check_sources(
    programs: Programs, prompts: Sequence[object], sources: Sequence[Sequence[int]] | None
) -> int:
    """Tokens of the longest source, 0 for a model without encoder. Raises UserError unless there is
    one for each prompt, or none where the model has no encoder."""
    if sources is None:
        programs.check_source(None, 'sources')
        return 0
    if len(sources) != len(prompts):
        raise UserError(f'{len(sources)} sources for {len(prompts)} prompts: give one for each')
    for i, source in enumerate(sources):
        programs.check_source(source, f'source {i}')
    return max(map(len, sources))

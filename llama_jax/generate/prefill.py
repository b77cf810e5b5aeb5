"""The prompts of a batch into a cache: padded to few shapes, read piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

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


def shape_of(
    programs: Programs, *, prompts: int, longest: int, max_tokens: int, prefill_chunk: int
) -> Shape:
    """What a batch is padded to: rows to a power of two times the mesh's batch shards, prompts to a
    power of two, or to whole pieces of `prefill_chunk` tokens where they are longer than one."""
    shards = batch_shards(programs.mesh)
    rows = shards * power_of_two(-(-prompts // shards))
    prompt = bucket(longest)
    if prompt > prefill_chunk:
        prompt = -(-longest // prefill_chunk) * prefill_chunk
    piece = min(prompt, prefill_chunk)
    needed = slots_needed(programs.config, length=prompt + max_tokens - 1, piece=piece)
    return Shape(rows, prompt, piece, bucket(needed))


def prefill(
    programs: Programs, prompts: Sequence[Sequence[int]], shape: Shape
) -> tuple[jax.Array, Cache, jax.Array]:
    """Features of each row's last token [B, D], the cache with all prompts, and their lengths [B],
    0 for rows without one."""
    token_BT = np.full((shape.rows, shape.prompt), programs.model.pad_id, np.int32)
    length_B = np.zeros(shape.rows, np.int32)
    for i, prompt in enumerate(prompts):
        token_BT[i, : len(prompt)] = prompt
        length_B[i] = len(prompt)
    length = programs.place(length_B)
    cache = programs.empty(batch=shape.rows, slots=shape.slots)
    x_BD = programs.no_features(shape.rows)
    for start in range(0, shape.prompt, shape.piece):
        x_BD, cache = programs.read(
            *(programs.params, cache, x_BD),
            programs.place(token_BT[:, start : start + shape.piece]),
            *(length, start),
            first=start == 0,
        )
    return x_BD, cache, length

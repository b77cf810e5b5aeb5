"""Texts to vectors: the mean over their tokens' features, of unit length."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.errors import UserError
from llama_jax.generate import decode
from llama_jax.generate.decode import Model
from llama_jax.generate.programs import Programs, bucket, check_prompt, power_of_two
from llama_jax.mesh import batch_shards
from llama_jax.model.layers import Params

ROWS = 8
"""Texts at a time, for each shard of the batch."""


class Embedder:
    """Makes vectors with the parameters of `programs`, of an encoder-decoder with its encoder. Any
    thread may call it."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._step = jax.jit(functools.partial(_embed, programs.model, causal=programs.causal))

    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Float32 [n, D] of token ids, in their order. Texts of like length go together, padded to
        powers of two. Raises UserError for one that is empty or longer than the context,
        NotFiniteError where the model computes no numbers."""
        programs, config = self._programs, self._programs.config
        for i, text in enumerate(texts):
            check_prompt(text, f'text {i}', vocab=config.ids)
            if len(text) > config.context:
                raise UserError(
                    f'text {i} has {len(text)} tokens, the context is {config.context}: shorten it'
                )
        vectors = np.zeros((len(texts), config.dim), np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        shards = batch_shards(programs.mesh)
        for start in range(0, len(texts), ROWS * shards):
            members = by_length[start : start + ROWS * shards]
            rows = shards * power_of_two(-(-len(members) // shards))
            longest = min(bucket(len(texts[members[-1]])), config.context)
            token_BT = np.full((rows, longest), programs.model.pad_id, np.int32)
            length_B = np.zeros(rows, np.int32)
            for row, i in enumerate(members):
                token_BT[row, : len(texts[i])] = texts[i]
                length_B[row] = len(texts[i])
            with jax.set_mesh(programs.mesh):
                vector_BD = self._step(
                    programs.params, programs.place(token_BT), programs.place(length_B)
                )
            vectors[members] = np.asarray(vector_BD)[: len(members)]
        for i in np.flatnonzero(~np.isfinite(vectors).all(axis=1))[:1]:
            raise programs.not_finite(f'text {i}: the model gives')
        return vectors


def _embed(
    model: Model,
    params: Params,
    token_BT: Int[Array, 'B T'],
    length_B: Int[Array, ' B'],
    *,
    causal: bool,
) -> Float[Array, 'B D']:
    real_BT = jnp.arange(token_BT.shape[1]) < length_B[:, None]
    if model.config.encoder_layers:
        x_BTD = decode.understood(model, params, token_BT, length_B).x_BSD
    else:
        # Under a causal mask no token sees the padding behind it.
        segment_BT = None if causal else real_BT.astype(jnp.int32)
        x_BTD, _ = decode.features(
            *(model, params, token_BT), length_B=length_B, segment_BT=segment_BT, causal=causal
        )
    sum_BD = jnp.where(real_BT[:, :, None], x_BTD.astype(jnp.float32), 0).sum(axis=1)
    return sum_BD / jnp.maximum(jnp.linalg.norm(sum_BD, axis=-1, keepdims=True), 1e-12)

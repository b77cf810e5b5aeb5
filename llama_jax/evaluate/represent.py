"""Texts to vectors: what the backbone makes of them, pooled over tokens, for every arm the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from llama_jax import layout, precision
from llama_jax.generate import finite
from llama_jax.mesh import batch_shards
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params

ROWS = 32
"""Texts per batch."""
SMALLEST = 32
"""Texts are padded to powers of two from here on."""

Step = Callable[[Params, jax.Array, jax.Array], jax.Array]


def features(
    config: ModelConfig,
    params: Params,
    token_BT: Int[Array, 'B T'],
    segment_BT: Int[Array, 'B T'],
    *,
    causal: bool,
    compute: Compute,
) -> Float[Array, 'B T D']:
    """Normalised output of the last layer; of an encoder-decoder, of its encoder."""
    model = layers.bind(config, params)
    with precision.matmuls(compute.precision):
        if config.encoder_layers:
            return model.encode(token_BT, segment_BS=segment_BT, compute=compute).x_BSD
        x_BTD, _ = model.features(token_BT, segment_BT=segment_BT, causal=causal, compute=compute)
    return x_BTD


def pooled(x_BTD: Float[Array, 'B T D'], segment_BT: Int[Array, 'B T']) -> Float[Array, 'B D']:
    """Mean over the tokens of each row, float32; 0 for a row of padding."""
    real_BT = (segment_BT > 0).astype(jnp.float32)
    sum_BD = jnp.einsum('BTD,BT->BD', x_BTD.astype(jnp.float32), real_BT, precision='highest')
    return sum_BD / jnp.maximum(real_BT.sum(axis=1, keepdims=True), 1)


@functools.lru_cache(maxsize=8)
def vector_step(config: ModelConfig, *, causal: bool, compute: Compute) -> Step:
    """A compiled function (params, tokens, segments [B, T]) -> pooled features [B, D]."""

    def step(params: Params, token_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
        x_BTD = features(config, params, token_BT, segment_BT, causal=causal, compute=compute)
        return jax.reshard(pooled(x_BTD, segment_BT), PartitionSpec())

    return jax.jit(step)


@functools.lru_cache(maxsize=8)
def layer_step(config: ModelConfig, *, causal: bool, compute: Compute) -> Step:
    """The same with the residual stream of every layer, the embedding first: [L + 1, B, D]."""

    def step(params: Params, token_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
        with precision.matmuls(compute.precision):
            x_LBTD = layers.bind(config, params).layer_features(
                token_BT, segment_BT=segment_BT, causal=causal, compute=compute
            )
        return jnp.stack([_whole(pooled(x_BTD, segment_BT)) for x_BTD in x_LBTD])

    return jax.jit(step)


def vectors(
    step: Step, params: Params, texts: Sequence[np.ndarray], *, longest: int, mesh: Mesh
) -> np.ndarray:
    """Float32 vectors [n, D] (or [L + 1, n, D] of a layer_step) of token arrays, in their order.
    `longest`: positions of the model, which no text and no padding exceeds. Raises NotFiniteError
    where they are no numbers."""
    rows = round_up(ROWS, batch_shards(mesh))
    out: np.ndarray | None = None
    with jax.set_mesh(mesh):
        for index, token_BT, segment_BT in batches(texts, rows=rows, longest=longest):
            array = step(params, place(token_BT, mesh), place(segment_BT, mesh))
            values = host(array)[..., : len(index), :]
            if out is None:
                out = np.zeros((*values.shape[:-2], len(texts), values.shape[-1]), np.float32)
            out[..., index, :] = values
    if out is None:
        raise ValueError('no texts to represent')
    if not np.isfinite(out).all():
        raise finite.error("the model's features are", params)
    return out


def batches(
    texts: Sequence[np.ndarray], *, rows: int, longest: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(index, tokens [rows, T], segments [rows, T]): texts of one padded length T together. The
    last rows of a batch may be padding; a padded place has token 0 and segment 0."""
    sizes = np.array([padded(len(text), longest) for text in texts])
    for size in sorted(set(sizes.tolist())):
        members = np.flatnonzero(sizes == size)
        for start in range(0, len(members), rows):
            index = members[start : start + rows]
            yield index, *padded_rows([texts[i] for i in index], rows=rows, length=size)


def padded_rows(
    texts: Sequence[np.ndarray], *, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments [rows, length]; segments are 1 where a text stands."""
    token_BT, segment_BT = np.zeros((2, rows, length), np.int32)
    for row, text in enumerate(texts):
        token_BT[row, : len(text)] = text
        segment_BT[row, : len(text)] = 1
    return token_BT, segment_BT


def padded(length: int, longest: int) -> int:
    """What a text of this length is padded to: a power of two, or the positions of the model."""
    return min(max(SMALLEST, 1 << (max(length, 1) - 1).bit_length()), longest)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def place(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Rows that every process has whole, divided over the batch shards of the mesh."""
    sharding = NamedSharding(mesh, layout.rows())
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def host(array: jax.Array) -> np.ndarray:
    """A replicated array on this host."""
    return np.asarray(array.addressable_data(0))


def _whole(x_BD: jax.Array) -> jax.Array:
    return jax.reshard(x_BD, PartitionSpec())

"""Depth: layers that follow each other, and layers that stand beside each other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.keys import named_key
from llama_jax.mesh import platform_in_use
from llama_jax.model.block import Block, rematerialized
from llama_jax.model.cache import Cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.wanted import Wanted

Blocks = Block | nnx.List
"""One Block whose arrays are stacked over layers, or a list of Blocks."""


def stacked(config: ModelConfig, *, depth: int, cross: bool, key: jax.Array) -> Block:
    """So many new layers as one, for a scan."""
    one = functools.partial(Block, config, depth=depth, cross=cross)
    return jax.vmap(lambda key: one(key=key))(jax.random.split(key, depth))


def through(
    blocks: Blocks,
    x_BTD: jax.Array,
    keys: jax.Array | None,
    *,
    compute: Compute,
    keep: Literal['each', 'trunk'] | None = None,
    wanted: Wanted | None = None,
    **context: Any,
) -> tuple[jax.Array, Any]:
    """The output of all layers, and what is to be kept: the output of each [L, B, T, D], or the
    'trunk' that the last one read. `keys`: of the embedding, then of each layer. `wanted`: where
    the output of the last one is read."""
    if wanted is not None:
        return _through_wanted(blocks, x_BTD, keys, wanted=wanted, compute=compute, **context), None
    layer_keys = None if keys is None else keys[1:]
    trunk_BTD = x_BTD
    if isinstance(blocks, nnx.List):
        kept = []
        for i, block in enumerate(blocks):
            layer_key = None if layer_keys is None else layer_keys[i]
            trunk_BTD = x_BTD
            x_BTD, _ = block(x_BTD, key=layer_key, compute=compute, **context)
            kept.append(x_BTD)
        return x_BTD, {'each': jnp.stack(kept), 'trunk': trunk_BTD}[keep] if keep else None

    def layer(x_BTD: jax.Array, block_and_key: Any) -> jax.Array:
        # Cut the layer out of the stack first: else the TPU compiler gathers it with the
        # stack's dimension of one still on, in padded tiles, and transposes the result.
        block, key = jax.lax.optimization_barrier(block_and_key)
        x_BTD, _ = block(x_BTD, key=key, compute=compute, **context)
        return x_BTD

    remat = rematerialized(layer, compute.remat)

    def step(carry: Any, block_and_key: Any) -> tuple[Any, Any]:
        trunk_BTD, _ = carry
        x_BTD = remat(trunk_BTD, block_and_key)
        # The trunk is in the carry, where it costs no memory: one of each layer would.
        carry = x_BTD, trunk_BTD if keep == 'trunk' else None
        return carry, x_BTD if keep == 'each' else None

    layers: Any = (blocks, layer_keys)
    # XLA for CPUs merges recomputed work of an unrolled scan back into the kept one.
    unrolled = platform_in_use() == 'cpu' and compute.remat == 'none'
    n_layers = jax.tree.leaves(blocks)[0].shape[0]
    unroll = compute.unroll or (n_layers if unrolled else 1)
    first = x_BTD, trunk_BTD if keep == 'trunk' else None
    (x_BTD, last_BTD), kept = jax.lax.scan(step, first, layers, unroll=unroll)
    return x_BTD, last_BTD if keep == 'trunk' else kept


def _through_wanted(
    blocks: Blocks,
    x_BTD: jax.Array,
    keys: jax.Array | None,
    *,
    wanted: Wanted,
    compute: Compute,
    **context: Any,
) -> jax.Array:
    """The last layer by itself, for it alone may leave places out: all are attended to, and the
    wanted ones alone attend."""
    before: Blocks
    if isinstance(blocks, nnx.List):
        before, last = nnx.List(blocks[:-1]), blocks[-1]
    else:
        before = jax.tree.map(lambda x_L: x_L[:-1], blocks)
        last = jax.tree.map(lambda x_L: x_L[-1], blocks)
    few = compute
    if compute.attention not in ('reference', 'xla'):  # others may refuse a part of the queries
        few = replace(compute, attention='auto')
    before_keys = None if keys is None else keys[:-1]
    trunk_BTD, _ = through(before, x_BTD, before_keys, compute=compute, **context)

    def layer(x_BTD: jax.Array, block: Block, key: jax.Array | None) -> jax.Array:
        def at_wanted(x_BTD: jax.Array) -> jax.Array:
            source = x_BTD, context['rope']
            return block(
                wanted.taken(x_BTD),
                source=source,
                rope=wanted.rotation(context['rope']),
                visible=wanted.visible(context['visible']),
                compute=few,
            )[0]

        return wanted.of(
            x_BTD, at_wanted, lambda x_BTD: block(x_BTD, key=key, compute=compute, **context)[0]
        )

    last_key = None if keys is None else keys[-1]
    return rematerialized(layer, compute.remat)(trunk_BTD, last, last_key)


def run_beside(
    blocks: Sequence[Block],
    trunk_BTD: jax.Array,
    cache: Cache | None,
    *,
    at_B: jax.Array | None,
    key: jax.Array | None,
    compute: Compute,
    **context: Any,
) -> tuple[list[jax.Array], Cache | None]:
    """Outputs of layers that all read the trunk; their caches are the last ones."""
    keys: Any = [None] * len(blocks)
    if key is not None:  # one of its own, so that the model draws as it does without them
        keys = jax.random.split(named_key(key, 'beside'), len(blocks))
    if cache is None:
        layer = rematerialized(
            lambda x_BTD, block, key: block(x_BTD, key=key, compute=compute, **context)[0],
            compute.remat,
        )
        return [layer(trunk_BTD, *one) for one in zip(blocks, keys, strict=True)], None
    n = len(cache.layers) - len(blocks)
    done = [
        block(trunk_BTD, cache=layer, at_B=at_B, key=key, compute=compute, **context)
        for block, layer, key in zip(blocks, cache.layers[n:], keys, strict=True)
    ]
    outputs, written = zip(*done, strict=True)
    return list(outputs), replace(cache, layers=[*cache.layers[:n], *written])

"""Layers beside the last one, which predict tokens further ahead (Gloeckle et al. 2024, section 2).

All read what the last layer reads, the trunk, and share its norm and the output head. Head 1 is the
last layer itself, so that a model without its other heads is a plain one.
"""

from __future__ import annotations

import jax
from flax import nnx

from llama_jax.model.block import Block
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params


def create(config: ModelConfig, n: int, key: jax.Array) -> Params:
    """Initial parameters of heads 2 to `n`, a layer each, by number."""
    keys = jax.random.split(key, n)
    return {
        str(j): nnx.to_pure_dict(nnx.state(_block(config, keys[j - 1]), nnx.Param))
        for j in range(2, n + 1)
    }


def bind(config: ModelConfig, params: Params) -> list[Block]:
    """Layers that compute with them, the nearest token's first."""
    structure, shapes = nnx.split(nnx.eval_shape(lambda: _block(config, jax.random.key(0))))
    blocks = []
    for number in sorted(params, key=int):
        block = nnx.merge(structure, shapes, copy=True)
        nnx.update(block, params[number])
        blocks.append(block)
    return blocks


def _block(config: ModelConfig, key: jax.Array) -> Block:
    return Block(config, depth=config.layers, cross=False, key=key)

"""A model as plain arrays and back; layers stacked for a scan or apart for decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from llama_jax import layout
from llama_jax.model.config import ModelConfig
from llama_jax.model.transformer import Transformer

Params = dict[str, Any]
"""Nested dict of arrays, named as the modules' attributes are."""

STACKS = ('blocks', 'encoder_blocks')
"""Parts of the parameters that are of all layers."""
HEADS = 'heads'
"""Of the parameters: layers beside the last one, see heads.py. A Transformer has none."""
TABLES = ('embed_VD', 'head_VD')
"""Parameters with a row for each id."""


def create(config: ModelConfig, key: jax.Array, mesh: Mesh) -> Params:
    """Initial parameters, made in their final placement: no device ever holds them whole."""
    placed = layout.shardings(abstract(config), mesh)
    # No mesh in scope: under one, random numbers are of replicated type, so drawn whole everywhere.
    return jax.jit(lambda key: split(Transformer(config, key=key)), out_shardings=placed)(key)


def abstract(config: ModelConfig) -> Params:
    """Shapes and types of the parameters, at no cost."""
    return jax.eval_shape(lambda: split(Transformer(config, key=jax.random.key(0))))


def split(model: Transformer) -> Params:
    """The parameters of `model`."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def bind(config: ModelConfig, params: Params) -> Transformer:
    """A model that computes with `params`, stacked or unstacked."""
    model = nnx.eval_shape(lambda: Transformer(config, key=jax.random.key(0)))
    rest = {name: value for name, value in params.items() if name != HEADS}
    for stack in STACKS:
        if not isinstance(params.get(stack), list):
            continue
        blocks: nnx.List = nnx.List()
        structure, shapes = nnx.split(getattr(model, stack))
        for layer in rest.pop(stack):
            block = nnx.merge(structure, shapes, copy=True)
            nnx.update(block, layer)
            blocks.append(block)
        setattr(model, stack, blocks)
    nnx.update(model, rest)
    return model


def unstack(params: Params) -> Params:
    """Blocks as a list with one entry per layer."""

    def apart(blocks: Params) -> list[Params]:
        n_layers = jax.tree.leaves(blocks)[0].shape[0]
        return [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(n_layers)]

    return _of_stacks(apart, params)


def stack(params: Params) -> Params:
    """Blocks as one entry with a leading dimension of layers."""
    return _of_stacks(
        lambda blocks: jax.tree.map(lambda *xs: jnp.stack(xs), *blocks),
        params,
    )


def _of_stacks(change: Callable[[Any], Any], params: Params) -> Params:
    return {name: change(value) if name in STACKS else value for name, value in params.items()}

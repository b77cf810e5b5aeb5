"""What of a model is trained: all of it, adapters beside its weights, or nothing of it.

One line of an experiment, so that runs of the three differ by it alone. What is trained are
`params`, with a gradient and an optimizer state; what is not is `frozen`. An objective sees them as
one tree, which `combined` makes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from llama_jax.errors import UserError
from llama_jax.layout import letters_of
from llama_jax.model import layers
from llama_jax.model.adapted import RANK, Adapted
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import STACKS, Params
from llama_jax.trees import named

INPUTS = {
    **dict.fromkeys(('q_DNH', 'k_DKH', 'v_DKH', 'gate_DF', 'up_DF'), 'D'),
    'out_NHD': 'NH',
    'down_FD': 'F',
}
"""Weights that can be adapted -> the letters of what they read, which are those of A."""
GROUP = 32
"""Inputs that share a scale in a base of int4."""


@dataclass(frozen=True)
class Full:
    """Every parameter is trained."""


@dataclass(frozen=True)
class LoRA:
    """Adapters of low rank are trained (Hu et al. 2021), and the parameters of the objective."""

    rank: int = 16
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ('all',)
    """Weights that have adapters: all, attention, mlp, cross, the name of a weight (q_DNH), or its
    letters (DKH: keys and values)."""
    dropout: float = 0.0
    """Of what an adapter reads."""
    base: Literal['int8', 'int4'] | None = None
    """What the matrices of the layers are kept in (Dettmers et al. 2023): one scale per output
    channel, with int4 one per 32 inputs. None: their own type, or that of the computation where
    that is smaller."""

    @property
    def scale(self) -> float:
        """Of the product of the factors."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Frozen:
    """The parameters of the objective are trained, such as a head, and nothing of the model."""


Tune = Full | LoRA | Frozen
FULL = Full()


def check(tune: Tune, config: ModelConfig, *, extra: Params, start: str | None) -> None:
    """Raise UserError for settings without effect or sense. `extra`: parameters of the objective;
    `start`: what the run begins with."""
    if isinstance(tune, Full):
        return
    kind = type(tune).__name__
    if start is None:
        raise UserError(
            f'--tune {kind} keeps the weights that a run starts with, and there are none: give '
            '--start, or --tune Full'
        )
    if isinstance(tune, Frozen):
        if not jax.tree.leaves(extra):
            raise UserError(
                '--tune Frozen trains the parameters of the objective alone, and this one has '
                'none: give --tune LoRA or Full'
            )
        return
    if tune.rank < 1:
        raise UserError(f'--tune.rank is {tune.rank}: it must be 1 or more')
    if not (math.isfinite(tune.alpha) and tune.alpha > 0):
        raise UserError(f'--tune.alpha is {tune.alpha}: it must be positive')
    if not 0 <= tune.dropout < 1:
        raise UserError(f'--tune.dropout is {tune.dropout}: it must be in [0, 1)')
    targeted(config, tune.targets)
    sizes = {'head_dim': config.head_dim, 'dim': config.dim, 'ffn': config.ffn}
    for name, size in sizes.items():
        if tune.base == 'int4' and size % GROUP:
            raise UserError(
                f'--tune.base int4 has a scale for each {GROUP} inputs, and {name} {size} does not '
                f'divide by {GROUP}: give --tune.base int8'
            )


def targeted(config: ModelConfig, targets: tuple[str, ...]) -> list[str]:
    """Dotted paths of the weights that have adapters. Raises UserError for a target that names
    none."""
    can = [
        path
        for path, _ in named(layers.abstract(config))
        if path.split('.')[0] in STACKS and path.rsplit('.', 1)[-1] in INPUTS
    ]
    if not targets:
        raise UserError('--tune.targets is empty: give all, or names of weights')
    found: set[str] = set()
    for target in targets:
        hit = [path for path in can if _is_named(path, target)]
        if not hit:
            known = dict.fromkeys(
                name for path in can for name in (*path.split('.'), _letters(path))
            )
            raise UserError(
                f'--tune.targets {target!r} names no weight that adapters can be put upon: there '
                f'are all, {", ".join(known)}'
            )
        found.update(hit)
    return [path for path in can if path in found]


def _is_named(path: str, target: str) -> bool:
    """Whether a target is all, the letters of a weight, its path, or parts of that."""
    return target in ('all', _letters(path)) or f'.{target}.' in f'.{path}.'


def _letters(path: str) -> str:
    return path.rsplit('_', 1)[-1]


def trained(tune: Tune, backbone: Params, config: ModelConfig, key: jax.Array) -> Params:
    """What of a model is trained, at its beginning: the `backbone`, adapters or nothing.

    A is drawn as `torch` draws a linear layer, uniform with bound 1 / sqrt(inputs), and B is 0, so
    that a step begins with the model as it was.
    """
    if isinstance(tune, Full):
        return backbone
    params: Params = {}
    if isinstance(tune, Frozen):
        return params
    shapes = dict(named(layers.abstract(config)))
    for i, path in enumerate(targeted(config, tune.targets)):
        *parents, name = path.split('.')
        here = params
        for parent in parents:
            here = here.setdefault(parent, {})
        here[name] = _factors(name, shapes[path].shape, tune.rank, jax.random.fold_in(key, i))
    return params


def _factors(name: str, shape: tuple[int, ...], rank: int, key: jax.Array) -> Params:
    """Of a weight of all layers."""
    letters = letters_of(name, len(shape))
    inputs = INPUTS[name]
    n = 1 + len(inputs)  # the layers stand in front
    L, read, made = shape[0], shape[1:n], shape[n:]
    bound = 1 / math.sqrt(math.prod(read))
    # Drawn as matrices, see model/attention.py.
    a = jax.random.uniform(key, (L, math.prod(read), rank), minval=-bound, maxval=bound)
    return {
        f'a_{inputs}{RANK}': a.reshape(L, *read, rank),
        f'b_{RANK}{letters[n:]}': jnp.zeros((L, rank, *made)),
    }


def combined(tune: Tune, params: Params, frozen: Params, key: jax.Array | None = None) -> Params:
    """The parameters that a model is bound to: those that are trained and those that are not as one
    tree, with adapters upon their weights. Nothing is computed. With a `key` their dropout is on.
    """
    if not frozen:
        return params
    if not isinstance(tune, LoRA):
        return {**frozen, **params}
    if not tune.dropout:
        key = None
    return _combined(tune, params, frozen, key)


def _combined(tune: LoRA, params: Params, frozen: Params, key: jax.Array | None) -> Params:
    both = dict(frozen)
    for i, (name, value) in enumerate(params.items()):
        own = None if key is None else jax.random.fold_in(key, i)
        if name not in frozen:
            both[name] = value
        elif isinstance(frozen[name], dict):
            both[name] = _combined(tune, value, frozen[name], own)
        else:
            a, b = (next(x for k, x in value.items() if k[0] == factor) for factor in 'ab')
            if own is not None:
                own = jax.random.split(own, len(a))  # of each layer
            both[name] = Adapted(
                frozen[name],
                a,
                b,
                own,
                scale=tune.scale,
                dropout=tune.dropout if key is not None else 0.0,
            )
    return both


def flops_share(tune: Tune) -> float:
    """How much of the FLOPs of a full step is left, those of the adapters aside: the forward pass,
    which is a third, and with adapters the gradients of activations, another."""
    return {Full: 1.0, LoRA: 2 / 3, Frozen: 1 / 3}[type(tune)]

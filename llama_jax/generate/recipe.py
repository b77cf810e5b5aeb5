"""What each array for decoding is made of: arrays of one layer of a model, alone or joined."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model.adapted import RANK, Adapted
from llama_jax.model.layers import Params
from llama_jax.model.quantized import Quantized
from llama_jax.model.unread import Unread
from llama_jax.trees import map_named


@dataclass(frozen=True)
class Part:
    """A parameter of one layer, or of none."""

    path: str
    value: jax.Array | np.ndarray | Unread | Quantized
    """A quantised one is made dense."""
    layer: int | None = None
    """Where `value` holds those of all layers: the one that is meant."""

    @property
    def ndim(self) -> int:
        """Dimensions of one layer."""
        return self.value.ndim - (self.layer is not None)


@dataclass(frozen=True)
class Joined:
    """An array, and the parameters of one layer that it is made of."""

    parts: tuple[Any, ...]
    join: Callable[..., Any] = lambda x: x
    """Of arrays of the host, or of devices. What it does to the first it does by views where it
    can."""


def parts(params: Params, layer: int | None, *, keep: Callable[[Quantized], bool]) -> Params:
    """A tree of Part, or of weights that consist of such. `keep`: whether a quantised weight stays
    as it is; else it is made dense."""

    def base(path: str, w: Any) -> Any:
        if isinstance(w, Quantized) and keep(w):
            return Quantized(Part(path, w.value, layer), Part(path, w.scale, layer))  # type: ignore[arg-type]
        return Part(path, w, layer)

    def part(path: str, w: Any) -> Any:
        if not isinstance(w, Adapted):
            return base(path, w)
        letters = path.rsplit('_', 1)[-1]
        n = w.a.ndim - 1 - (layer is not None)
        a, b = f'a_{letters[:n]}{RANK}', f'b_{RANK}{letters[n:]}'
        return Adapted(
            base(path, w.base),
            Part(f'{path}.{a}', w.a, layer),  # type: ignore[arg-type]
            Part(f'{path}.{b}', w.b, layer),  # type: ignore[arg-type]
        )

    return map_named(part, params, is_leaf=lambda w: isinstance(w, Adapted | Quantized))


def alone(params: Any) -> Any:
    """A tree of `parts`, each by itself."""
    if isinstance(params, dict):
        return {
            name: _alone(name, w) if isinstance(w, Adapted) else alone(w)
            for name, w in params.items()
        }
    if isinstance(params, list):
        return [alone(x) for x in params]
    return _base((params,))


def _alone(name: str, w: Any) -> Params:
    return _upon(name, w.a.ndim - 1, _base((w.base,)), Joined((w.a,)), Joined((w.b,)))


def turned(name: str, w: Any, join: Callable[..., Any]) -> Any:
    """A weight [..., D] as `name` [D, ...], by a `join` that puts the last dimension first."""
    if not isinstance(w, Adapted):
        return _base((w,), join)
    return _upon(name, 1, _base((w.base,), join), Joined((w.b,), join), Joined((w.a,), join))


def together(
    name: str,
    weights: tuple[Any, ...],
    join: Callable[..., Any],
    *,
    outputs: Callable[[Any], Any],
    sizes: tuple[int, ...],
) -> Any:
    """Weights [D, ...] joined to `name` [..., D], one of whose letters is J, of so many entries for
    each.

    Adapters of any of them are one of the whole, whose rank is the sum of theirs: B has a block for
    each, and zeros elsewhere. `outputs` turns a B [R, ...] to [..., R].
    """
    base = _base(tuple(w.base if isinstance(w, Adapted) else w for w in weights), join)
    adapted = [i for i, w in enumerate(weights) if isinstance(w, Adapted)]
    if not adapted:
        return base
    letters = name.rsplit('_', 1)[-1]
    around = [(sum(sizes[:i]), sum(sizes[i + 1 :])) for i in adapted]
    blocks = functools.partial(_blocks, outputs, letters.index('J'), around)
    return _upon(
        name,
        len(letters) - 1,
        base,
        Joined(tuple(weights[i].b for i in adapted), blocks),
        Joined(tuple(weights[i].a for i in adapted), _side_by_side),
    )


def _blocks(
    outputs: Callable[[Any], Any], axis: int, around: list[tuple[int, int]], *b_R: Any
) -> Any:
    xp = np if isinstance(b_R[0], np.ndarray) else jnp
    ranks = [len(b) for b in b_R]
    total: Any = 0
    for i, b in enumerate(b_R):
        x = outputs(b)
        pad = [(0, 0)] * x.ndim
        pad[axis], pad[-1] = around[i], (sum(ranks[:i]), sum(ranks[i + 1 :]))
        total = total + xp.pad(x, pad)
    return total


def _side_by_side(*a_DR: Any) -> Any:
    xp = np if isinstance(a_DR[0], np.ndarray) else jnp
    return xp.concatenate([a.T for a in a_DR])


def _base(parts: tuple[Any, ...], join: Callable[..., Any] = lambda x: x) -> Any:
    if isinstance(parts[0], Quantized):
        values, scales = (tuple(getattr(w, name) for w in parts) for name in ('value', 'scale'))
        return Quantized(Joined(values, join), Joined(scales, join))  # type: ignore[arg-type]
    return Joined(parts, join)


def _upon(name: str, n: int, base: Any, a: Joined, b: Joined) -> Params:
    """An adapted weight as three arrays by name; A has the first `n` letters."""
    letters = name.rsplit('_', 1)[-1]
    return {name: base, f'a_{letters[:n]}{RANK}': a, f'b_{RANK}{letters[n:]}': b}


def with_adapters(made: Any, scale: float | None) -> Any:
    """A tree that was made by a recipe, with its adapted weights as such; `scale` of None: there
    are none."""
    if isinstance(made, list):
        return [with_adapters(x, scale) for x in made]
    if not isinstance(made, dict) or scale is None:
        return made
    factors = {name[0]: x for name, x in made.items() if name[:2] in ('a_', 'b_')}
    if factors:
        (base,) = (x for name, x in made.items() if name[:2] not in ('a_', 'b_'))
        return Adapted(base, factors['a'], factors['b'], scale=scale)
    return {name: with_adapters(x, scale) for name, x in made.items()}


def scale_of(params: Params) -> float | None:
    """The scale of all adapters of a model; None without any."""
    leaves = jax.tree.leaves(params, is_leaf=lambda w: isinstance(w, Adapted))
    scales = {w.scale for w in leaves if isinstance(w, Adapted)}
    assert len(scales) < 2, 'one tune, or one file of adapters, has one scale'
    return scales.pop() if scales else None

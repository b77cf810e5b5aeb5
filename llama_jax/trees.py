"""Names and sizes of the leaves of a pytree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def map_named(
    f: Callable[..., Any],
    tree: Any,
    *others: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """`jax.tree.map` whose function also gets the leaf's dotted path ('blocks.attention.q_DNH')."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(name(path), *leaves), tree, *others, is_leaf=is_leaf
    )


def named(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf of `tree` with its dotted path."""
    return [(name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def name(path: tuple[Any, ...]) -> str:
    """The dotted name of a pytree key path."""
    return jax.tree_util.keystr(path, simple=True, separator='.')


def size(tree: Any) -> int:
    """Number of elements in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def n_bytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

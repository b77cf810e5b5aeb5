"""Parameters under the names and in the order of another code base, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np

from llama_jax import layout, trees
from llama_jax.convert.fit import entry
from llama_jax.convert.tensors import ROTATED, Scheme, Tensors, check_llama, fused, sizes_of
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.unread import Unread


class Renamed(Tensors):
    """Parameters as `scheme` has them, embedding first, then layer by layer. Rows of the vocabulary
    that no token has are left out, and so is a tied head."""

    def __init__(self, scheme: Scheme, params: Params, config: ModelConfig):
        """`params` have layers apart, and leaves that are read when asked for."""
        check_llama(config)
        self._scheme, self._n_ids = scheme, config.ids
        self._sizes = {**sizes_of(config), 'V': config.ids}
        leaves = dict(trees.named(params))
        paths = sorted(leaves, key=lambda path: (path != 'embed_VD', 'blocks.' not in path))
        self._home: dict[str, tuple[str, Unread]] = {}
        for path in paths:
            layer = path.split('.')[1] if path.startswith('blocks.') else None
            self._home[entry(scheme, path)[0].format(i=layer)] = path, leaves[path]

    def __getitem__(self, name: str) -> np.ndarray:
        path, leaf = self._home[name]
        letters = layout.letters_of(path, leaf.ndim)
        apart = entry(self._scheme, path)[1].replace(',', '')
        w = leaf.read().transpose([letters.index(letter) for letter in apart])
        if apart[0] == 'V':
            w = w[: self._n_ids]
        if path.endswith(ROTATED):
            w = self._scheme.to_pairs(w)
        return np.ascontiguousarray(w.reshape(self.shape(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return fused(entry(self._scheme, self._home[name][0])[1], self._sizes)

    def dtype(self, name: str) -> np.dtype:
        return self._home[name][1].dtype


def apart(params: Params) -> Params:
    """Stacked parameters, which are on the host, as `Renamed` takes them."""

    def leaf(w: np.ndarray, i: int | None) -> Unread:
        shape = w.shape if i is None else w.shape[1:]
        return Unread(shape, w.dtype, lambda: w if i is None else w[i])

    params = jax.tree.map(np.asarray, params)
    n_layers = len(jax.tree.leaves(params['blocks'])[0])
    blocks = [
        jax.tree.map(lambda w, i=i: leaf(w, i), params['blocks'])  # type: ignore[misc]
        for i in range(n_layers)
    ]
    rest = {name: value for name, value in params.items() if name != 'blocks'}
    return {**jax.tree.map(lambda w: leaf(w, None), rest), 'blocks': blocks}


def from_params(scheme: Scheme, params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Float32 tensors under their names, from stacked parameters, all rows of the vocabulary
    included. A tied head is left out."""
    check_llama(config)  # before the parameters are looked at
    tensors = Renamed(scheme, apart(params), replace(config, vocab_padding=0))
    return {name: w.astype(np.float32, copy=False) for name, w in tensors.items()}

"""Quantized weights and KV cache: what generation keeps in fewer bits than it computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.model.layers import TABLES
from llama_jax.model.quantized import dense, quantize
from llama_jax.trees import map_named

# The letters that a product with the matrix sums over.
_SUMMED = {
    **dict.fromkeys(('q_DNH', 'k_DKH', 'v_DKH', 'gate_DF', 'up_DF', 'embed_VD', 'head_VD'), 'D'),
    'out_NHD': 'NH',
    'down_FD': 'F',
    # As columns.py has them.
    **dict.fromkeys(('qkv_KJHD', 'gate_up_JFD'), 'D'),
    'out_DNH': 'NH',
    'down_DF': 'F',
}
_GROUP = 32


@dataclass(frozen=True)
class Quantization:
    """How generation saves memory, and the time to read it. Norms and biases stay as they are."""

    weights: Literal['int8', 'int4'] | None = None
    """Of matrices: one scale per output channel, and with int4 one per `group` of its inputs; the
    embedding and the head have int8 then too."""
    cache: Literal['int8'] | None = None
    """Of keys and values: one scale per token and head."""
    group: int | None = None
    """Inputs that share a scale with int4; 32 unless it is given."""

    def __post_init__(self) -> None:
        for name, known in (('weights', ('int8', 'int4')), ('cache', ('int8',))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(
                    f'quantization of {name} {value!r}: there is {" and ".join(known)}, '
                    'or none at all'
                )
        if self.group is not None and self.weights != 'int4':
            raise UserError(f'quantization group {self.group} is for weights int4: leave it out')
        if self.group is not None and self.group < 1:
            raise UserError(f'quantization group {self.group}: at least one input shares a scale')


NOTHING = Quantization()
"""All in the type of the computation."""


def quantized(path: str, x: jax.Array, how: Quantization, *, whole_int4: bool) -> Any:
    """A parameter of one layer, or of none, quantised where it is a matrix. `whole_int4`: those of
    int4 are rounded, and given as float32 again."""
    name = path.rsplit('.', 1)[-1]
    if how.weights is None or name not in _SUMMED:
        return x
    letters = name.rsplit('_', 1)[1]
    summed = tuple(letters.index(letter) for letter in _SUMMED[name])
    if how.weights == 'int8' or name in TABLES:
        return quantize(x, summed)
    group = how.group or _GROUP
    if x.shape[summed[-1]] % group:
        raise UserError(
            f'{path} {list(x.shape)} does not divide into groups of {group} inputs: set another '
            'group of the quantization'
        )
    w = quantize(x, summed, bits=4, group=group)
    return dense(w, jnp.float32) if whole_int4 else w


def by_rows(path: str, how: Quantization) -> bool:
    """Whether each entry of the first dimension is quantised by itself."""
    name = path.rsplit('.', 1)[-1]
    if how.weights is None or name not in _SUMMED:
        return False
    return name.rsplit('_', 1)[1][0] not in _SUMMED[name]


def placements(params: Any, mesh: Mesh) -> Any:
    """Where each array lies for decoding: by the letters of its name, or, of a quantised one, of
    its matrix. Raises UserError when scales do not divide over the mesh."""

    def place(path: str, x: Any) -> NamedSharding:
        matrix, _, part = path.rpartition('.')
        placed = layout.act(layout.letters_of(path, x.ndim))
        if part != 'scale':
            return NamedSharding(mesh, placed)
        spec = layout.of_scales(placed, x.shape)
        try:
            NamedSharding(mesh, spec).shard_shape(x.shape)
        except ValueError:
            raise UserError(
                f'the scales {list(x.shape)} of {matrix} do not divide over the mesh as the matrix '
                'does: set another group of the quantization'
            ) from None
        return NamedSharding(mesh, spec)

    return map_named(place, params)

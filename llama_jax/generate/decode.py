"""The two compiled programs of generation: read a prompt, and write tokens in one loop."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout, precision
from llama_jax.generate import columns
from llama_jax.generate.sampling import Sampling, sample
from llama_jax.model import layers
from llama_jax.model.cache import Cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.trees import map_named


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompt:
    """Tokens to read. Rows are right-aligned: padding (segment 0) stands before the first."""

    token_BT: Int[Array, 'B T']
    position_BT: Int[Array, 'B T']
    """Counted from the row's first token."""
    segment_BT: Int[Array, 'B T']
    """1 for tokens, 0 for padding."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a step of decoding needs and makes; donated, so that the cache stays in place."""

    cache: Cache
    token_B: Int[Array, ' B']
    """The newest token of each row, not in the cache yet."""
    position_B: Int[Array, ' B']
    """Its place, counted from the row's first token."""
    done_B: Bool[Array, ' B']
    """The row has met an end id, or holds no prompt."""


Carry = tuple[jax.Array, State, jax.Array]
"""Steps taken, state, and what was drawn [B, T]."""


def prepare(params: Params, *, mesh: Mesh, compute: Compute, turned: bool) -> Params:
    """Parameters for decoding only: layers apart, in the type of the computation, and gathered
    over the axes that a step would otherwise gather them over again and again.

    `turned`, here and below: weights lie for the steps of columns.py.
    """
    dtype = precision.dtype(compute.precision)

    def apart(params: Params) -> Params:
        params = params if isinstance(params['blocks'], list) else layers.unstack(params)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return columns.turn(params) if turned else params

    with jax.set_mesh(mesh):
        placed = map_named(
            lambda path, x: NamedSharding(mesh, layout.act(layout.letters_of(path, x.ndim))),
            jax.eval_shape(apart, params),
        )
        return jax.jit(apart, out_shardings=placed)(params)


def extend(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    prompt: Prompt,
    *,
    compute: Compute,
    turned: bool,
) -> tuple[Float[Array, 'B 1 D'], Cache]:
    """Read a piece of the prompt into the cache; the features of its last position."""
    with precision.matmuls(compute.precision):
        params = columns.turn(params) if turned else params
        x_BTD, written = layers.bind(config, params).features(
            prompt.token_BT,
            position_BT=prompt.position_BT,
            segment_BT=prompt.segment_BT,
            compute=compute,
            cache=cache,
        )
    assert written is not None  # given a cache, a model returns one
    return x_BTD[:, -1:], written


def prefill(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    prompt: Prompt,
    sampling: Sampling,
    *,
    compute: Compute,
    turned: bool,
    eos_ids: tuple[int, ...],
) -> State:
    """Read the last piece of the prompt and draw the first token. The head, the dearest product of
    a small model, is applied to the last position only."""
    x_BTD, cache = extend(config, params, cache, prompt, compute=compute, turned=turned)
    # jax 0.12 forgets the placement of a batch of one row when a dimension is indexed away.
    last_position_B, last_segment_B = (
        jax.reshard(x_BT[:, -1], layout.act('B'))
        for x_BT in (prompt.position_BT, prompt.segment_BT)
    )
    position_B = last_position_B + 1
    token_B = _draw(_logits(config, params, x_BTD, compute, turned), sampling, position_B)
    done_B = is_end(token_B, eos_ids) | (last_segment_B == 0)
    return State(cache, token_B, position_B, done_B)


def decode(
    config: ModelConfig,
    params: Params,
    state: State,
    sampling: Sampling,
    n_steps: Int[Array, ''],
    *,
    slots: int,
    compute: Compute,
    turned: bool,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[State, Int[Array, 'B T']]:
    """Draw up to `n_steps` (<= `slots`) more tokens of each row in one loop on the device.

    It ends early when every row is done; what a row has after an end id is `pad_id`.
    """
    out_BT = jnp.full((len(state.token_B), slots), pad_id, jnp.int32, out_sharding=layout.act('BT'))

    def one_more(state: State) -> tuple[jax.Array, Cache]:
        if turned:
            with precision.matmuls(compute.precision):
                return columns.step(
                    config, params, state.token_B, state.position_B, state.cache, compute=compute
                )
        prompt = Prompt(
            state.token_B[:, None], state.position_B[:, None], jnp.ones_like(state.token_B)[:, None]
        )
        x_BTD, cache = extend(config, params, state.cache, prompt, compute=compute, turned=False)
        return _logits(config, params, x_BTD, compute, turned=False), cache

    def unfinished(carry: Carry) -> jax.Array:
        step, state, _ = carry
        return (step < n_steps) & ~state.done_B.all()

    def draw(carry: Carry) -> Carry:
        step, state, out_BT = carry
        logits_BV, cache = one_more(state)
        position_B = state.position_B + 1
        token_B = _draw(logits_BV, sampling, position_B)
        token_B = jnp.where(state.done_B, pad_id, token_B)
        out_BT = jax.lax.dynamic_update_slice_in_dim(out_BT, token_B[:, None], step, axis=1)
        done_B = state.done_B | is_end(token_B, eos_ids)
        return step + 1, State(cache, token_B, position_B, done_B), out_BT

    _, state, out_BT = jax.lax.while_loop(unfinished, draw, (jnp.int32(0), state, out_BT))
    return state, out_BT


def is_end(token_B: Int[Array, ' B'], eos_ids: tuple[int, ...]) -> Bool[Array, ' B']:
    """Whether each token is one of the end ids."""
    end_B = jnp.zeros_like(token_B, bool)
    for eos_id in eos_ids:
        end_B |= token_B == eos_id
    return end_B


def _logits(
    config: ModelConfig, params: Params, x_BTD: jax.Array, compute: Compute, turned: bool
) -> jax.Array:
    params = columns.turn(params) if turned else params
    with precision.matmuls(compute.precision):
        return layers.bind(config, params).logits(x_BTD)[:, 0]


def _draw(logits_BV: jax.Array, sampling: Sampling, position_B: jax.Array) -> jax.Array:
    rows = layout.act('B')
    whole_BV = P(*rows, None)  # a device needs the vocabulary of its own rows to draw from it
    return jax.shard_map(
        sample,
        in_specs=(whole_BV, rows, rows),
        out_specs=rows,
        check_vma=False,  # carries of loops start as constants, which do not vary over the mesh
    )(jax.reshard(logits_BV, whole_BV), sampling, position_B)

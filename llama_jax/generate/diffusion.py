"""Text by unmasking: models of masked and of block diffusion fill masks in, a few at a time, in an
order that is theirs to choose."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout, precision
from llama_jax.errors import UserError
from llama_jax.generate import finite
from llama_jax.generate.controls import Controls, numbered
from llama_jax.generate.generator import Completion, controls_of
from llama_jax.generate.programs import bucket, check_prompt, is_cpu, power_of_two
from llama_jax.generate.sampling import ORDER, sample, uniform
from llama_jax.generate.settings import Settings, rows_of
from llama_jax.mesh import batch_shards
from llama_jax.model import layers
from llama_jax.model.cache import Cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer

Order = Literal['confidence', 'margin', 'random', 'left']
"""Which masks are filled in first: those of the most probable token, those whose token is most
probable before the second, any, or from left to right."""
USED = ('max_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'typical_p', 'seed', 'stop_ids')
"""Controls that unmasking knows."""


@dataclass(frozen=True)
class _Model:
    """What is fixed when a program is compiled."""

    config: ModelConfig
    compute: Compute
    mask_id: int
    read_previous: bool
    block: int


class _Text(NamedTuple):
    """Texts that are being written."""

    token_BT: Int[Array, 'B T']
    cache: Cache | None
    finite_B: Bool[Array, ' B']


class Unmasker:
    """Writes texts of given lengths with one model of masked or block diffusion.

    A batch is padded to few shapes, each compiled once. A row's text does not depend on its batch
    mates: draws are those of its seed, the place and the pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        mesh: Mesh,
        compute: Compute,
        mask_id: int,
        end_ids: tuple[int, ...],
        pad_id: int,
        read_previous: bool = False,
        block: int = 0,
    ):
        """`params` may be stacked or not and lie anywhere; those on the mesh are not copied.
        `read_previous` and `block` are those of the objective; 0: every token sees all."""
        layout.check(config.sizes(), mesh)
        if is_cpu(mesh) and compute.precision != 'float32':  # as Programs do
            compute = replace(compute, precision='float32')
        self.mesh, self.end_ids, self._pad_id = mesh, tuple(end_ids), pad_id
        self.model = _Model(config, compute, mask_id, read_previous, block)
        params = jax.device_put(params, layout.shardings(params, mesh))
        with jax.set_mesh(mesh):
            apart = block and not isinstance(params['blocks'], list)
            self.params = _unstacked(params) if apart else params

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        order: Order = 'confidence',
        steps: int = 0,
        block: int = 0,
        **settings: Any,
    ) -> list[Completion]:
        """Continue each prompt by `max_tokens` tokens, which are masks at first; a text ends before
        the first end id among them.

        `block` tokens are written after each other, each block in `steps` passes of the model that
        unmask equally many tokens (0: one token a pass); block 0: all of them in one. A model of
        block diffusion has a block of its own, and keeps keys and values of the blocks before it.
        Other settings are the fields of Controls that are in USED, one for all rows or one each;
        the default temperature is 0. Raises UserError for what cannot be done, NotFiniteError where
        logits are no numbers.
        """
        controls = self._checked(prompts, settings)
        longest = max(one.max_tokens for one in controls)
        for name, value in (('block', block), ('steps', steps)):
            if value < 0:
                raise UserError(f'{name} {value}: it must be 0 or more')
        own = self.model.block
        if own and block not in (0, own):
            raise UserError(
                f'block {block}: the model was trained to write blocks of {own} tokens, leave it '
                'out'
            )
        size = own or block or longest
        if steps > size:
            raise UserError(f'steps {steps}: a block of {size} tokens takes {size} at most')
        shards = batch_shards(self.mesh)
        rows = shards * power_of_two(-(-len(prompts) // shards))
        length_B, stop_B = np.ones(rows, np.int32), np.ones(rows, np.int32)
        for i, (prompt, one) in enumerate(zip(prompts, controls, strict=True)):
            length_B[i], stop_B[i] = len(prompt), len(prompt) + one.max_tokens
            if own:  # which has learnt whole blocks
                stop_B[i] = min(-(-stop_B[i] // own) * own, self.model.config.context)
        first_B = length_B // own * own if own else length_B
        n_blocks = int(np.max(-(-(stop_B - first_B) // size)))
        width = own or bucket(size)
        token_BT = np.full((rows, bucket(int(stop_B.max()) + width)), self._pad_id, np.int32)
        for i, prompt in enumerate(prompts):
            token_BT[i, : len(prompt)] = prompt
            token_BT[i, len(prompt) : stop_B[i]] = self.model.mask_id
        found: Any = rows_of(
            controls,
            lengths=[len(prompt) for prompt in prompts],
            rows=rows,
            end_ids=self.end_ids,
            vocab=self.model.config.vocab,
            bias=False,
        )
        placed = NamedSharding(self.mesh, layout.rows())
        arrays = jax.device_put((token_BT, first_B, length_B, stop_B, found), placed)
        how = np.array([size, steps or size, n_blocks], np.int32)
        with jax.set_mesh(self.mesh):
            text = _written(self.model, self.params, *arrays, how, order=order, width=width)
        token_BT, finite_B = jax.device_get((text.token_BT, text.finite_B))
        if not finite_B[: len(prompts)].all():
            raise finite.error('the model gives', self.params, self.model.compute.precision)
        return [
            self._completion(token_BT[i, length_B[i] :][: one.max_tokens].tolist(), one)
            for i, one in enumerate(controls)
        ]

    def _checked(
        self, prompts: Sequence[Sequence[int]], settings: dict[str, Any]
    ) -> list[Controls]:
        if not len(prompts):
            raise UserError('no prompts: give at least one')
        controls = controls_of(len(prompts), {'temperature': 0.0, **settings})
        usual, config = Controls(), self.model.config
        for i, (prompt, one) in enumerate(zip(prompts, controls, strict=True)):
            check_prompt(prompt, f'prompt {i}', vocab=config.ids)
            one.check(vocab=config.ids)
            for field in fields(Controls):
                if field.name not in USED and getattr(one, field.name) != getattr(
                    usual, field.name
                ):
                    raise UserError(
                        f'{field.name} is for models that write from left to right: leave it out'
                    )
            if len(prompt) + one.max_tokens > config.context:
                raise UserError(
                    f'prompt {i} ({len(prompt)} tokens) and max_tokens ({one.max_tokens}) exceed '
                    f"the model's context of {config.context}: shorten one of them"
                )
        if isinstance(settings.get('seed'), list | range | np.ndarray):
            return controls
        return numbered([tuple(prompt) for prompt in prompts], controls)

    def _completion(self, tokens: list[int], one: Controls) -> Completion:
        ends = {*self.end_ids, *one.stop_ids}
        n = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return Completion(tokens[:n], 'stop' if n < len(tokens) else 'length')


def _write(
    model: _Model,
    params: Params,
    token_BT: Int[Array, 'B T'],
    first_B: Int[Array, ' B'],
    length_B: Int[Array, ' B'],
    stop_B: Int[Array, ' B'],
    settings: Settings,
    how: Int[Array, ' 3'],
    *,
    order: Order,
    width: int,
) -> _Text:
    """Texts whose masks from place `length_B` on are filled in, block by block from place
    `first_B`. `how`: tokens of a block, passes over each, and blocks."""
    size, passes, n_blocks = how

    def unended(carry: tuple[jax.Array, _Text]) -> jax.Array:
        n, text = carry
        place_T = jnp.arange(token_BT.shape[1])
        own_BT = (place_T >= length_B[:, None]) & (place_T < stop_B[:, None])
        end_BT = (text.token_BT[:, :, None] == settings.end_BE[:, None, :]).any(axis=2)
        written_B = first_B + n * size >= stop_B
        return (n < n_blocks) & ~jnp.all((own_BT & end_BT).any(axis=1) | written_B)

    def one_block(carry: tuple[jax.Array, _Text]) -> tuple[jax.Array, _Text]:
        n, text = carry
        at_B = first_B + n * size
        until_B = jnp.minimum(at_B + size, stop_B)
        look = functools.partial(
            _logits, model, params, at_B=at_B, until_B=until_B, stop_B=stop_B, width=width
        )

        def one_pass(i: jax.Array, text: _Text) -> _Text:
            logits_BWV, cache = look(text)
            fill = jax.shard_map(
                functools.partial(_filled, model, order=order),
                in_specs=(*[layout.rows()] * 6, P(), P()),
                out_specs=layout.rows(),
                check_vma=False,  # as generate/decode.py draws
            )
            token_BT, finite_B = fill(
                jax.reshard(logits_BWV, layout.rows()),
                *(text.token_BT, at_B, length_B, until_B, settings),
                *(passes - i, i),
            )
            return _Text(token_BT, cache, text.finite_B & finite_B)

        text = jax.lax.fori_loop(0, passes, one_pass, text)
        if model.block:  # the keys and values of the block without a mask
            _, cache = look(text)
            text = text._replace(cache=cache)
        return n + 1, text

    finite_B = jnp.ones(len(length_B), bool, out_sharding=layout.act('B'))
    text = _Text(token_BT, _read(model, params, token_BT, stop_B), finite_B)
    return jax.lax.while_loop(unended, one_block, (jnp.int32(0), text))[1]._replace(cache=None)


# Of the module: a program is kept when a run makes another Unmasker for its next samples.
_written = jax.jit(_write, static_argnums=0, static_argnames=('order', 'width'))
_unstacked = jax.jit(layers.unstack)


def _read(
    model: _Model, params: Params, token_BT: Int[Array, 'B T'], stop_B: Int[Array, ' B']
) -> Cache | None:
    """A cache of the texts as they are, where the model writes block by block: those of the prompt
    that are whole are seen, and the others written again."""
    if not model.block:
        return None
    B, T = token_BT.shape
    dtype = precision.dtype(model.compute.precision)
    cache = Cache.empty(model.config, batch=B, slots=T, dtype=dtype)
    if cache.length_B is not None:
        cache = replace(cache, length_B=stop_B)
    place_BT = jnp.broadcast_to(jnp.arange(T) // model.block, (B, T))
    with precision.matmuls(model.compute.precision):
        _, read = layers.bind(model.config, params).features(
            token_BT, place_BT=place_BT, cache=cache, compute=model.compute
        )
    return read


def _logits(
    model: _Model,
    params: Params,
    text: _Text,
    *,
    at_B: Int[Array, ' B'],
    until_B: Int[Array, ' B'],
    stop_B: Int[Array, ' B'],
    width: int,
) -> tuple[Float[Array, 'B W V'], Cache | None]:
    """Float32 logits of the `width` tokens of each row from place `at_B` on. Of a cache, which they
    are written into, they see what is before place `until_B`."""
    bound: Transformer = layers.bind(model.config, params)
    with precision.matmuls(model.compute.precision):
        if model.block:
            token_BW = _window(text.token_BT, at_B, width)
            sees_BW = jnp.broadcast_to(until_B[:, None] - 1, token_BW.shape)
            x_BWD, cache = bound.features(
                token_BW,
                cache=text.cache,
                at_B=at_B,
                place_BT=sees_BW,
                compute=model.compute,
            )
            return bound.logits(x_BWD), cache
        # All masks of a text are there from the beginning, for its length is given.
        inside_BT = jnp.arange(text.token_BT.shape[1]) < stop_B[:, None]
        x_BTD, _ = bound.features(
            text.token_BT,
            segment_BT=inside_BT.astype(jnp.int32),
            causal=False,
            compute=model.compute,
        )
        return bound.logits(_window(x_BTD, at_B - model.read_previous, width)), None


def _window(array: jax.Array, at_B: jax.Array, width: int) -> jax.Array:
    """[B, T, ...] -> [B, W, ...], from place `at_B` of each row on."""

    def own(array: jax.Array, at_B: jax.Array) -> jax.Array:
        place_BW = at_B[:, None] + jnp.arange(width)
        row_B1 = jnp.arange(len(at_B))[:, None]
        return array.at[row_B1, place_BW].get(mode='clip')

    rows = layout.rows()
    return jax.shard_map(own, in_specs=rows, out_specs=rows)(
        jax.reshard(array, P(*rows, *[None] * (array.ndim - 1))), jax.reshard(at_B, rows)
    )


def _filled(
    model: _Model,
    logits_BWV: Float[Array, 'B W V'],
    token_BT: Int[Array, 'B T'],
    at_B: Int[Array, ' B'],
    length_B: Int[Array, ' B'],
    until_B: Int[Array, ' B'],
    settings: Settings,
    left: Int[Array, ''],
    number: Int[Array, ''],
    *,
    order: Order,
) -> tuple[Int[Array, 'B T'], Bool[Array, ' B']]:
    """The texts with some masks of the window filled in, as many as leave equally many for each of
    the passes that are `left`, this one included; and whether the logits of a row are numbers.
    `number` of the pass. Each device fills in its own rows."""
    B, W, V = logits_BWV.shape
    row_B1, place_BW = jnp.arange(B)[:, None], at_B[:, None] + jnp.arange(W)
    token_BW = token_BT.at[row_B1, place_BW].get(mode='fill', fill_value=0)
    inside_BW = (place_BW >= length_B[:, None]) & (place_BW < until_B[:, None])
    open_BW = inside_BW & (token_BW == model.mask_id)
    finite_B = (finite.finite(logits_BWV) | ~open_BW).all(axis=1)

    logits_BWV = jnp.where(jnp.arange(V) == model.mask_id, -jnp.inf, logits_BWV)
    flat = jax.tree.map(lambda x: jnp.repeat(x, W, axis=0), settings)
    # Draws of one place in different passes are independent of each other.
    draw_N = (place_BW + number * model.config.context).reshape(-1)
    drawn_BW = sample(logits_BWV.reshape(B * W, V), flat, draw_N).reshape(B, W)

    if order == 'confidence':
        log_p_BWV = jax.nn.log_softmax(logits_BWV, axis=-1)
        first_BW = jnp.take_along_axis(log_p_BWV, drawn_BW[..., None], axis=-1)[..., 0]
    elif order == 'margin':
        best_BW2, _ = jax.lax.top_k(jax.nn.softmax(logits_BWV, axis=-1), 2)
        first_BW = best_BW2[..., 0] - best_BW2[..., 1]
    elif order == 'random':
        first_BW = uniform(flat, place_BW.reshape(-1), purpose=ORDER).reshape(B, W)
    else:
        first_BW = -place_BW.astype(jnp.float32)
    first_BW = jnp.where(open_BW, first_BW, -jnp.inf)
    before_BWW = first_BW[:, None, :] > first_BW[:, :, None]
    tie_BWW = first_BW[:, None, :] == first_BW[:, :, None]
    before_BWW |= tie_BWW & (jnp.arange(W) < jnp.arange(W)[:, None])
    n_B1 = -(-open_BW.sum(axis=1, keepdims=True) // left)
    taken_BW = open_BW & (before_BWW.sum(axis=2) < n_B1)
    filled_BW = jnp.where(taken_BW, drawn_BW, token_BW)
    return token_BT.at[row_B1, place_BW].set(filled_BW, mode='drop'), finite_B

"""Prompts in, tokens out: batches padded to few shapes, each compiled once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax import layout, precision
from llama_jax.errors import UserError
from llama_jax.generate.decode import Prompt, State, decode, extend, prefill, prepare
from llama_jax.generate.sampling import Sampling
from llama_jax.mesh import batch_shards
from llama_jax.model.cache import Cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params

log = logging.getLogger(__name__)

SMALLEST = 16
"""Prompts and outputs are padded to powers of two from here on."""


@dataclass(frozen=True)
class Completion:
    """What one row generated."""

    tokens: list[int]
    """Without the end id."""
    finish_reason: Literal['stop', 'length']
    """An end id, or max_tokens."""


@dataclass(frozen=True)
class Shape:
    """Sizes that programs are compiled for."""

    rows: int
    prompt: int
    """Padded length of the prompts, in pieces of at most `prefill_chunk` tokens."""
    slots: int
    """Tokens that the cache has room for."""

    def cache_bytes(self, config: ModelConfig, itemsize: int) -> int:
        """Memory of keys and values, over all devices."""
        per_token = 2 * config.layers * config.kv_heads * config.head_dim * itemsize
        return per_token * self.rows * self.slots


class Generator:
    """Completes batches of prompts with one model.

    A batch is padded: rows to a power of two times the mesh's batch shards, prompts and outputs to
    powers of two. Each shape compiles once; lengths within it, sampling settings and seeds compile
    nothing. A row's tokens do not depend on its batch mates.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        mesh: Mesh,
        compute: Compute,
        eos_ids: tuple[int, ...],
        pad_id: int,
        prefill_chunk: int = 512,
    ):
        """`params` may be stacked or not, and placed anywhere; a copy for decoding is made.

        Longer prompts are read in pieces of `prefill_chunk` tokens (a power of two), which bounds
        the memory that attention takes. Raises UserError when the model does not fit the mesh.
        """
        layout.check(config.sizes(), mesh)
        if config.encoder_layers:
            raise UserError(
                'the generator continues a text, which an encoder-decoder does not: use a model '
                'with encoder_layers 0'
            )
        if prefill_chunk < SMALLEST or prefill_chunk & (prefill_chunk - 1):
            raise UserError(
                f'prefill_chunk {prefill_chunk} is no power of two from {SMALLEST} on: take 512'
            )
        for name, ids in (('eos_ids', eos_ids), ('pad_id', (pad_id,))):
            if any(not 0 <= i < config.vocab for i in ids):
                raise UserError(
                    f'{name} {ids} is outside the vocabulary of {config.vocab}: '
                    'take it from the tokenizer that the model was trained with'
                )
        if _is_cpu(mesh) and compute.precision != 'float32':
            # Ten times faster: a CPU turns a bfloat16 matrix into float32 for every single row.
            log.info('generation computes in float32 on a CPU, not in %s', compute.precision)
            compute = replace(compute, precision='float32')
        self.config, self.mesh, self.compute = config, mesh, compute
        self.eos_ids, self.pad_id, self.prefill_chunk = tuple(eos_ids), pad_id, prefill_chunk
        turned = _is_cpu(mesh) and config.llama
        self._params = prepare(params, mesh=mesh, compute=compute, turned=turned)
        self._empty = jax.jit(
            functools.partial(Cache.empty, config, dtype=precision.dtype(compute.precision)),
            static_argnames=('batch', 'slots'),
        )
        self._extend = jax.jit(
            lambda params, cache, prompt: extend(
                config, params, cache, prompt, compute=compute, turned=turned
            )[1],
            donate_argnums=1,
        )
        self._prefill = jax.jit(
            functools.partial(
                prefill, config, compute=compute, turned=turned, eos_ids=self.eos_ids
            ),
            donate_argnums=1,
        )
        self._decode = jax.jit(
            functools.partial(
                decode, config, compute=compute, turned=turned, eos_ids=self.eos_ids, pad_id=pad_id
            ),
            static_argnames='slots',
            donate_argnums=1,
        )

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """Complete each prompt by up to `max_tokens` tokens, in one loop on the device.

        Settings are one for all rows or one per row; see Sampling. Rows of one seed and one prompt
        draw the same tokens: for several samples of a prompt give it several times, with
        `seed=range(n)`. Raises UserError for what cannot be done.
        """
        shape = self._shape(prompts, max_tokens)
        sampling = self._sampling(len(prompts), shape, temperature, top_k, top_p, seed)
        with jax.set_mesh(self.mesh):
            state = self._read(prompts, shape, sampling)
            drawn = [jnp.copy(state.token_B)[:, None]]  # the state is donated
            if max_tokens > 1:
                _, out_BT = self._decode(
                    self._params, state, sampling, max_tokens - 1, slots=_bucket(max_tokens - 1)
                )
                drawn.append(out_BT)
        token_BT = np.concatenate(jax.device_get(drawn), axis=1)
        return [self._completion(row[:max_tokens]) for row in token_BT[: len(prompts)]]

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        chunk: int = 16,
    ) -> Iterator[list[int]]:
        """Complete one prompt; yields the first token, then `chunk` at a time, without the end id.

        The same tokens as a call of the generator. While the caller deals with one piece, the
        device computes the next.
        """
        if chunk < 1:
            raise UserError(f'chunk {chunk}: a stream yields at least one token at a time')
        shape = self._shape([prompt], max_tokens)
        sampling = self._sampling(1, shape, temperature, top_k, top_p, seed)
        with jax.set_mesh(self.mesh):
            state = self._read([prompt], shape, sampling)
        return self._pieces(state, sampling, max_tokens, chunk)

    def _pieces(
        self, state: State, sampling: Sampling, max_tokens: int, chunk: int
    ) -> Iterator[list[int]]:
        ready, n_ready, drawn = jnp.copy(state.token_B)[:, None], 1, 1
        while True:
            n_following = min(chunk, max_tokens - drawn)
            if n_following:
                with jax.set_mesh(self.mesh):
                    state, following = self._decode(
                        self._params, state, sampling, n_following, slots=chunk
                    )
                following.copy_to_host_async()
            piece = self._completion(np.asarray(ready)[0, :n_ready])
            if piece.tokens:
                yield piece.tokens
            if piece.finish_reason == 'stop' or not n_following:
                return
            ready, n_ready, drawn = following, n_following, drawn + n_following

    def shape(self, n_prompts: int, longest: int, max_tokens: int) -> Shape:
        """What a batch is padded to; for sizing memory (see Shape.cache_bytes)."""
        shards = batch_shards(self.mesh)
        rows = shards * _power_of_two(-(-n_prompts // shards))
        prompt = _bucket(longest)
        if prompt > self.prefill_chunk:
            prompt = -(-longest // self.prefill_chunk) * self.prefill_chunk
        return Shape(rows, prompt, _bucket(prompt + max_tokens - 1))

    def _shape(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Shape:
        vocab, context = self.config.vocab, self.config.context
        if max_tokens < 1:
            raise UserError(f'max_tokens {max_tokens}: at least one token is generated')
        if not len(prompts):
            raise UserError('no prompts: give at least one')
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f'prompt {i} is empty: give at least one token, such as bos')
            low, high = min(prompt), max(prompt)
            if low < 0 or high >= vocab:
                raise UserError(
                    f'prompt {i} holds token id {low if low < 0 else high}, outside the vocabulary '
                    f'of {vocab}: use the tokenizer that the model was trained with'
                )
            if len(prompt) + max_tokens > context:
                raise UserError(
                    f'prompt {i} ({len(prompt)} tokens) and max_tokens ({max_tokens}) exceed the '
                    f"model's context of {context}: shorten one of them"
                )
        return self.shape(len(prompts), max(map(len, prompts)), max_tokens)

    def _sampling(
        self,
        n: int,
        shape: Shape,
        temperature: float | Sequence[float],
        top_k: int | Sequence[int],
        top_p: float | Sequence[float],
        seed: int | Sequence[int],
    ) -> Sampling:
        def row_wise(
            name: str,
            value: float | Sequence[float],
            dtype: type,
            allowed: Callable[[float], bool],
            what: str,
        ) -> jax.Array:
            values = np.asarray(value)
            if values.ndim and values.shape != (n,):
                raise UserError(
                    f'{len(values)} values of {name} for {n} prompt(s): one, or one each'
                )
            wrong = [v for v in values.flat if not allowed(v)]
            if wrong:
                raise UserError(f'{name} {wrong[0]} is not {what}')
            padded: np.ndarray = np.zeros(shape.rows, dtype)  # greedy: padding rows draw nothing
            padded[:n] = values
            return self._place(padded, 'B')

        return Sampling(
            row_wise(
                'temperature',
                temperature,
                np.float32,
                lambda t: 0 <= t < np.inf,
                '0 (greedy) or a positive number',
            ),
            row_wise(
                'top_k',
                top_k,
                np.int32,
                lambda k: 0 <= k == int(k) < 2**31,
                '0 (off) or a positive integer',
            ),
            row_wise('top_p', top_p, np.float32, lambda p: 0 < p <= 1, 'in (0, 1]'),
            row_wise(
                'seed',
                seed,
                np.uint32,
                lambda s: 0 <= s == int(s) < 2**32,
                'an integer in [0, 2^32)',
            ),
        )

    def _read(self, prompts: Sequence[Sequence[int]], shape: Shape, sampling: Sampling) -> State:
        """Prefill: the state after the first token."""
        token_BT = np.full((shape.rows, shape.prompt), self.pad_id, np.int32)
        segment_BT = np.zeros_like(token_BT)
        position_BT = np.zeros_like(token_BT)
        for i, prompt in enumerate(prompts):
            start = shape.prompt - len(prompt)
            token_BT[i, start:] = prompt
            segment_BT[i, start:] = 1
            position_BT[i, start:] = np.arange(len(prompt))
        cache = self._empty(batch=shape.rows, slots=shape.slots)
        chunk = min(self.prefill_chunk, shape.prompt)
        for start in range(0, shape.prompt, chunk):
            piece = Prompt(
                *(
                    self._place(x[:, start : start + chunk], 'BT')
                    for x in (token_BT, position_BT, segment_BT)
                )
            )
            if start + chunk < shape.prompt:
                cache = self._extend(self._params, cache, piece)
        return self._prefill(self._params, cache, piece, sampling)

    def _place(self, x: np.ndarray, letters: str) -> jax.Array:
        return jax.device_put(x, NamedSharding(self.mesh, layout.act(letters)))

    def _completion(self, token_T: np.ndarray) -> Completion:
        tokens = token_T.tolist()
        ends = [i for i, token in enumerate(tokens) if token in self.eos_ids]
        return Completion(tokens[: ends[0]], 'stop') if ends else Completion(tokens, 'length')


def _is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == 'cpu'


def _bucket(n: int) -> int:
    return max(SMALLEST, _power_of_two(n))


def _power_of_two(n: int) -> int:
    """The smallest that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()

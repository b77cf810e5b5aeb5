"""A model made ready to generate: parameters as a step reads them, and its compiled programs."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import layout, precision
from llama_jax.errors import UserError
from llama_jax.generate import decode as decode_lib
from llama_jax.generate import finite
from llama_jax.generate.decode import Model
from llama_jax.generate.prepare import How, prepare, prepared
from llama_jax.generate.quantized import NOTHING, Quantization
from llama_jax.generate.settings import END_IDS
from llama_jax.model.cache import Cache, Cross
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import HEADS, Params

log = logging.getLogger(__name__)

SMALLEST = 16
"""Prompts and outputs are padded to powers of two from here on."""


class Programs:
    """The programs of generation for one model on one mesh, each compiled at its first use.

    Attributes:
        model: what is fixed when they are compiled.
        params: parameters as they take them.
        quantization: what has fewer bits.
        heads: layers beside the last one, which can draft; each has a cache.
        end_ids: ids that end a text.
        causal: whether a token sees only those before it where a text is read for its vector.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        mesh: Mesh,
        compute: Compute,
        end_ids: tuple[int, ...],
        pad_id: int,
        quantization: Quantization = NOTHING,
        causal: bool = True,
    ):
        """`params` may be stacked or not, placed anywhere or `Unread`; a copy for decoding is made,
        and none of them is kept.

        Raises UserError when the model does not fit the mesh, or ids are not of its vocabulary.
        """
        layout.check(config.sizes(), mesh, shared_heads=True)
        if config.encoder_layers and quantization != NOTHING:
            raise UserError(
                'quantization is for models without an encoder: leave it out, or use a model with '
                'encoder_layers 0'
            )
        # Where tensor parallelism exceeds the key-value heads, several devices hold the same one.
        copies = layout.head_copies(config.kv_heads, mesh)
        config = replace(config, kv_heads=config.kv_heads * copies)
        for name, ids in (('eos_ids', end_ids), ('pad_id', (pad_id,))):
            if any(not 0 <= i < config.ids for i in ids):
                raise UserError(
                    f'{name} {ids} is outside the vocabulary of {config.ids}: '
                    'take it from the tokenizer that the model was trained with'
                )
        if len(end_ids) > END_IDS:
            raise UserError(f'{len(end_ids)} end ids: at most {END_IDS}')
        in_columns = is_cpu(mesh) and config.llama
        matrices = precision.dtype(compute.precision)
        if is_cpu(mesh) and compute.precision != 'float32':
            # A CPU turns a bfloat16 matrix into float32 for every single row, but for columns.py.
            kept = compute.precision if in_columns else 'float32'
            log.info('on a CPU generation computes in float32, and keeps matrices in %s', kept)
            matrices = precision.dtype(kept)
            compute = replace(compute, precision='float32')
        self.mesh, self.end_ids, self.causal = mesh, tuple(end_ids), causal
        self.model = model = Model(config, compute, in_columns, pad_id)
        self.dtype = precision.dtype(compute.precision)
        self.quantization = quantization
        whole_int4 = is_cpu(mesh) and quantization.weights == 'int4'
        if whole_int4:
            log.info('int4 on a CPU: matrices are rounded to it, and kept and used as float32')
        how = How(self.dtype, matrices, copies, quantization, whole_int4)
        self.heads = len(params.get(HEADS, {}))
        self.params = prepare(model, params, how, mesh=mesh)
        self._again = functools.partial(prepared, model, how=how)
        self._prepared: jax.stages.Wrapped | None = None
        cached = replace(config, layers=config.layers + self.heads)
        self.empty = jax.jit(
            functools.partial(
                Cache.empty, cached, dtype=jnp.dtype(quantization.cache or self.dtype)
            ),
            static_argnames=('batch', 'slots'),
        )
        self.empty_cross = jax.jit(
            functools.partial(Cross.empty, config, dtype=self.dtype),
            static_argnames=('batch', 'slots'),
        )
        self.encode = jax.jit(functools.partial(decode_lib.encode, model))
        self.read = jax.jit(
            functools.partial(_read, model), static_argnames='first', donate_argnums=1
        )
        self.begin = jax.jit(
            functools.partial(decode_lib.begin, model), static_argnames='n_top', donate_argnums=1
        )
        self.decode = jax.jit(
            functools.partial(decode_lib.decode, model),
            static_argnames=('slots', 'n_top'),
            donate_argnums=1,
        )

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.model.config

    def renew(self, params: Params) -> None:
        """Take other parameters than the ones before, of the same shapes, on the devices: those
        after a step of training. One program copies them, and nothing else compiles anew."""
        if self._prepared is None:
            placed = jax.tree.map(lambda x: x.sharding, self.params)
            self._prepared = jax.jit(self._again, out_shardings=placed)
        self.params = {}  # or there would be room for both
        with jax.set_mesh(self.mesh):
            self.params = self._prepared(params)

    def check_length(self, n_prompt: int, max_tokens: int, name: str) -> None:
        """Raise UserError when prompt and output together are longer than the context."""
        if n_prompt + max_tokens > self.config.context:
            raise UserError(
                f'{name} ({n_prompt} tokens) and max_tokens ({max_tokens}) exceed the '
                f"model's context of {self.config.context}: shorten one of them"
            )

    def check_source(self, source: object, name: str) -> None:
        """Raise UserError unless it is a sequence for the encoder, or None where there is none."""
        config = self.config
        if source is None:
            if config.encoder_layers:
                raise UserError(
                    f'{name} is missing: an encoder-decoder reads one for each prompt (--source)'
                )
            return
        if not config.encoder_layers:
            raise UserError(f'{name} is given, but this model has no encoder: leave it out')
        check_prompt(source, name, vocab=config.ids)
        n = len(source)  # type: ignore[arg-type]
        if n > config.context:
            raise UserError(f"{name} ({n} tokens) exceeds the model's context of {config.context}")

    def not_finite(self, what: str) -> finite.NotFiniteError:
        """The error of a text for which the model computed no numbers; `what` says where."""
        return finite.error(what, self.params, self.model.compute.precision)

    def place(self, x: np.ndarray) -> jax.Array:
        """An array of the host by row: its first dimension is the batch."""
        return jax.device_put(x, NamedSharding(self.mesh, layout.rows()))

    def no_features(self, batch: int) -> jax.Array:
        """Zeros [B, D], for `read` to fill in."""
        placed = NamedSharding(self.mesh, P(*layout.rows(), None))
        return jnp.zeros((batch, self.config.dim), self.dtype, device=placed)

    def cache_bytes(self, *, rows: int, slots: int) -> int:
        """Memory of keys and values, over all devices; `slots` of a row, those for the source of an
        encoder-decoder included."""
        config = self.config
        per_head = config.head_dim * self.dtype.itemsize
        if self.quantization.cache:
            per_head = config.head_dim + np.dtype(np.float32).itemsize
        layers = config.layers + self.heads
        return 2 * layers * config.kv_heads * per_head * rows * slots


def _read(
    model: Model,
    params: Params,
    cache: Cache,
    x_BD: jax.Array,
    token_BT: jax.Array,
    length_B: jax.Array,
    start: jax.Array,
    *,
    first: bool,
) -> tuple[jax.Array, Cache]:
    """A piece of the prompts from place `start` on in every row; `x_BD` gathers the features of
    each row's last token."""
    # A prompt that has ended reads padding right behind itself: further on in a ring it would take
    # the place of what the next tokens see.
    at_B = None if first else jnp.minimum(length_B, start)
    x_BTD, cache = decode_lib.read(model, params, cache, token_BT, at_B)
    return decode_lib.last_features(x_BD, x_BTD, length_B - 1 - start), cache


def is_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is of CPUs, which decode with weights in another order."""
    return mesh.devices.flat[0].platform == 'cpu'


def check_prompt(prompt: object, name: str, *, vocab: int) -> None:
    """Raise UserError when it is not a list of at least one id of the vocabulary."""
    ids = np.asarray(prompt)
    if not ids.size:
        raise UserError(f'{name} is empty: give at least one token, such as bos')
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f'{name} is no list of token ids: give integers')
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise UserError(
            f'{name} holds token id {low if low < 0 else high}, outside the vocabulary '
            f'of {vocab}: use the tokenizer that the model was trained with'
        )


def check_chunk(prefill_chunk: int) -> None:
    """Raise UserError when prompts cannot be read in such pieces."""
    if prefill_chunk < SMALLEST or prefill_chunk & (prefill_chunk - 1):
        raise UserError(f'prefill_chunk {prefill_chunk} is no power of two from {SMALLEST} on')


def bucket(n: int) -> int:
    """The padded length for `n` tokens."""
    return max(SMALLEST, power_of_two(n))


def power_of_two(n: int) -> int:
    """The smallest that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()

"""The LLaMA decoder (Touvron et al. 2023), and encoder-decoders of the same layers (Vaswani et al.
2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax import layout, precision
from llama_jax.errors import UserError
from llama_jax.keys import named_key
from llama_jax.model.block import Block, drop
from llama_jax.model.cache import Cache, Cross
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.depth import Blocks, run_beside, stacked, through
from llama_jax.model.initial import fan_in
from llama_jax.model.linear import plain_in_use
from llama_jax.model.masks import Visibility, across
from llama_jax.model.norm import norm
from llama_jax.model.positions import sinusoidal
from llama_jax.model.quantized import product, rows
from llama_jax.model.rope import Rotation, rotation_of
from llama_jax.model.wanted import Wanted
from llama_jax.model.width import width_of


class Memory(NamedTuple):
    """What an encoder made of a sequence; a decoder's segment k sees its segment k."""

    x_BSD: Float[Array, 'B S D']
    segment_BS: Int[Array, 'B S']


class Transformer(nnx.Module):
    """Embedding, blocks, final norm and head; with `config.encoder_layers`, an encoder as well.

    `blocks` is one Block whose arrays are stacked over layers (a scan: short programs, training),
    or a list of Blocks (unrolled: each layer's cache is updated in place, decoding); so is
    `encoder_blocks`.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        if not config.vocab:
            raise UserError('model.vocab 0 leaves it to a tokenizer, and here is none: set one')
        embed_key, head_key, blocks_key = jax.random.split(key, 3)
        shape = (config.vocab, config.dim)
        encodes, final_norm = config.encoder_layers > 0, config.norm_place == 'pre'
        self.config = config
        width = width_of(config)
        self.embed_VD = nnx.Param(fan_in(embed_key, shape, width.base))
        self.position_CD = _learned_positions(config, named_key(key, 'positions'))
        self.encoder_blocks: Blocks | None = (
            stacked(
                config,
                depth=config.encoder_layers,
                cross=False,
                key=named_key(key, 'encoder'),
            )
            if encodes
            else None
        )
        self.encoder_norm = norm(config) if encodes and final_norm else None
        self.blocks: Blocks = stacked(config, depth=config.layers, cross=encodes, key=blocks_key)
        self.norm = norm(config, scale=width.out) if final_norm else None
        self.head_VD = None if config.tied else nnx.Param(fan_in(head_key, shape, width.base))

    def __call__(
        self, token_BT: Int[Array, 'B T'], **context: Any
    ) -> tuple[Float[Array, 'B T V'], Cache | None]:
        """Float32 logits of the next token at every position, and the cache with these tokens.
        Arguments are those of `features`."""
        x_BTD, cache = self.features(token_BT, **context)
        return self.logits(x_BTD), cache

    def features(
        self,
        token_BT: Int[Array, 'B T'],
        *,
        position_BT: Int[Array, 'B T'] | None = None,
        segment_BT: Int[Array, 'B T'] | None = None,
        causal: bool = True,
        prefix_BT: Int[Array, 'B T'] | None = None,
        memory: Memory | None = None,
        compute: Compute,
        cache: Cache | None = None,
        at_B: Int[Array, ' B'] | None = None,
        length_B: Int[Array, ' B'] | None = None,
        until_BS: Int[Array, 'B S'] | None = None,
        place_BT: Int[Array, 'B T'] | None = None,
        key: jax.Array | None = None,
        beside: Sequence[Block] = (),
        wanted: Wanted | None = None,
    ) -> tuple[Float[Array, '*J B T D'], Cache | None]:
        """Normalised output of the last layer, before the head.

        Args:
          token_BT: token ids.
          position_BT: position of each token; default: its place in the row.
          segment_BT: document of each token, 0 for padding; tokens see only their own document.
            Default: one document, no padding.
          causal: tokens see only what does not come after them.
          prefix_BT: not 0 for tokens that the whole document sees, those before them included. With
            a cache it has to be in the first piece.
          memory: of `encode`; a decoder with an encoder needs it, or a cache with its `cross`.
          compute: precision, kernels and rematerialisation.
          cache: is written, and keeps what earlier pieces wrote; needs unrolled blocks (see
            layers.unstack). Each row is one document, and padding stands behind it.
          at_B: place of each row's first token: what the row has read before is seen. None: nothing
            was read, and the piece attends to itself alone, by the fastest kernel.
          length_B: of each row's text, for rotations that go by length (config.by_length); default:
            that of the cache, else of each document.
          until_BS: of each slot of the cache the first place that does not see it, where a row is a
            tree of texts (see Visibility); needs `at_B`, and positions by depth. Without a cache of
            each token, which needs `place_BT`.
          place_BT: of each token in the order in which tokens see each other: those of the same
            place and of those before it. Default: its place in the row. With a cache that was read
            before (`at_B`), the last slot that it sees.
          key: turns dropout on.
          beside: layers that read what the last layer reads, each for itself (see heads.py). Then
            the output is [1 + n, B, T, D], the last layer's first; a cache holds them behind the
            model's own.
          wanted: where the output is read; elsewhere it is that of zeros, and the last layer does
            no more there than keys and values. Under dropout all is computed.
        """
        config = self.config
        if cache is not None and not causal:
            raise UserError('a cache holds what comes before a token: it needs causal attention')
        cross = None if cache is None else cache.cross
        if (memory is None and cross is None) != (self.encoder_blocks is None):
            raise UserError(
                'an encoder-decoder needs the memory that its encoder makes: call encode first'
                if memory is None and cross is None
                else 'this model has no encoder to make a memory: set --model.encoder-layers'
            )
        if cache is None and at_B is not None:
            raise UserError('at_B is a place in a cache: give the cache too')
        if until_BS is not None and at_B is None and place_BT is None:
            raise UserError('until_BS is of a cache that is read on: give at_B too')
        if cache is not None and segment_BT is not None:
            raise UserError('a row of a cache is one document: leave segment_BT out')
        if at_B is not None and prefix_BT is not None:
            raise UserError('a prefix has to be in the first piece: leave at_B out')
        if wanted is not None and (cache is not None or memory is not None or beside):
            raise UserError(
                'a cache, an encoder and layers beside the last work at every place: leave out '
                '`wanted`'
            )
        if key is not None and config.dropout:
            wanted = None  # a draw is of whole rows
        if at_B is not None:
            at_B = jax.reshard(at_B, layout.act('B'))
        whole = segment_BT is None
        position_BT, segment_BT = _places(token_BT, position_BT, segment_BT, at_B)
        if prefix_BT is not None:
            prefix_BT = jax.reshard(prefix_BT, layout.act('BT'))
        if place_BT is not None:
            place_BT = jax.reshard(place_BT, layout.act('BT'))
        if cache is None or at_B is None:
            visible = Visibility(
                *(segment_BT, segment_BT, place_BT, place_BT),
                prefix_BS=prefix_BT,
                until_BS=until_BS,
                causal=causal,
                pattern=config.pattern,
                whole=whole,
            )
        else:
            visible = cache.visible(
                *(at_B, token_BT.shape[1]),
                pattern=config.pattern,
                until_BS=until_BS,
                sees_BT=place_BT,
            )
        context: dict[str, Any] = {'visible': visible, 'compute': compute}
        if memory is not None:
            segment_BS = jax.reshard(memory.segment_BS, layout.act('BS'))
            context['memory'] = memory.x_BSD, across(segment_BT, segment_BS)
        elif cross is not None:
            segment_BS = jax.reshard(cross.segment_BS, layout.act('BS'))
            seen = Visibility(segment_BT, segment_BS, causal=False)  # no query is padding

        keys = None if key is None else jax.random.split(key, 1 + config.layers)
        x_BTD = self._embedded(token_BT, position_BT, compute, keys)
        if cache is not None:
            length_B = cache.length_B
        own_BT = None if whole else segment_BT
        context['rope'] = self._rotation(position_BT, own_BT, length_B)
        trunk_BTD = x_BTD
        if cache is None:
            x_BTD, trunk_BTD = through(
                *(self.blocks, x_BTD, keys),
                keep='trunk' if beside else None,
                wanted=wanted,
                **context,
            )
        elif not isinstance(self.blocks, nnx.List):
            raise UserError('decoding with a cache needs unrolled layers: see layers.unstack')
        else:
            written, n_own = [], len(cache.layers) - len(beside)
            own = zip(self.blocks, cache.layers[:n_own], strict=True)
            for i, (block, layer) in enumerate(own):
                layer_key = None if keys is None else keys[1 + i]
                if cross is not None:
                    context['memory'] = cross.layers[i], seen
                trunk_BTD = x_BTD
                x_BTD, layer = block(x_BTD, cache=layer, at_B=at_B, key=layer_key, **context)
                written.append(layer)
            cache = replace(cache, layers=[*written, *cache.layers[n_own:]])
        if beside:
            more, cache = run_beside(beside, trunk_BTD, cache, at_B=at_B, key=key, **context)
            x_BTD = jnp.stack([x_BTD, *more])
        return x_BTD if self.norm is None else self.norm(x_BTD), cache

    def encode(
        self,
        token_BS: Int[Array, 'B S'],
        *,
        position_BS: Int[Array, 'B S'] | None = None,
        segment_BS: Int[Array, 'B S'] | None = None,
        compute: Compute,
        key: jax.Array | None = None,
    ) -> Memory:
        """Normalised output of the encoder, which sees whole documents; see `features`."""
        x_BSD, segment_BS, _ = self._encoded(
            token_BS, position_BS, segment_BS, compute=compute, key=key
        )
        return Memory(x_BSD if self.encoder_norm is None else self.encoder_norm(x_BSD), segment_BS)

    def cross(self, memory: Memory) -> Cross:
        """What each layer of the decoder attends to in a memory of `encode`, for a cache to hold;
        needs unrolled blocks."""
        if not isinstance(self.blocks, nnx.List):
            raise UserError('decoding with a cache needs unrolled layers: see layers.unstack')
        layers = [block.cross.keys_and_values(memory.x_BSD) for block in self.blocks]
        return Cross(layers, memory.segment_BS)

    def layer_features(
        self,
        token_BT: Int[Array, 'B T'],
        *,
        position_BT: Int[Array, 'B T'] | None = None,
        segment_BT: Int[Array, 'B T'] | None = None,
        causal: bool = True,
        compute: Compute,
    ) -> Float[Array, 'L B T D']:
        """Embeddings, then the residual stream after every layer [L + 1, B, T, D], not normalised:
        of the decoder, or of the encoder where there is one. Arguments are those of `features`."""
        if self.encoder_blocks is not None:
            _, _, x_LBTD = self._encoded(
                *(token_BT, position_BT, segment_BT), compute=compute, keep=True
            )
            return x_LBTD
        whole = segment_BT is None
        position_BT, segment_BT = _places(token_BT, position_BT, segment_BT)
        x_BTD = self._embedded(token_BT, position_BT, compute, None)
        _, x_LBTD = through(
            *(self.blocks, x_BTD, None),
            keep='each',
            rope=self._rotation(position_BT, None if whole else segment_BT),
            visible=Visibility(
                segment_BT, segment_BT, causal=causal, pattern=self.config.pattern, whole=whole
            ),
            compute=compute,
        )
        return jnp.concatenate([x_BTD[None], x_LBTD])

    def _encoded(
        self,
        token_BS: jax.Array,
        position_BS: jax.Array | None,
        segment_BS: jax.Array | None,
        *,
        compute: Compute,
        key: jax.Array | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, jax.Array, Any]:
        config = self.config
        if self.encoder_blocks is None:
            raise UserError('this model has no encoder: set --model.encoder-layers above 0')
        whole = segment_BS is None
        position_BS, segment_BS = _places(token_BS, position_BS, segment_BS)
        keys = None if key is None else jax.random.split(key, 1 + config.encoder_layers)
        embedded_BSD = self._embedded(token_BS, position_BS, compute, keys)
        x_BSD, x_LBSD = through(
            *(self.encoder_blocks, embedded_BSD, keys),
            keep='each' if keep else None,
            rope=self._rotation(position_BS, None if whole else segment_BS),
            visible=Visibility(
                segment_BS, segment_BS, causal=False, pattern=config.pattern, whole=whole
            ),
            compute=compute,
        )
        if keep:
            x_LBSD = jnp.concatenate([embedded_BSD[None], x_LBSD])
        return x_BSD, segment_BS, x_LBSD

    def embed(self, token_BT: Int[Array, 'B T'], dtype: jnp.dtype) -> Float[Array, 'B T D']:
        """Embeddings of tokens, without positions."""
        embed_VD = plain_in_use(self.embed_VD, 'VD', dtype)
        x_BTD = rows(embed_VD, token_BT, letters='BTD', dtype=dtype)
        if self.config.positions != 'sinusoidal':
            return x_BTD
        # Embeddings begin with a variance of 1 / D: scaled to be as large as the waves.
        return x_BTD * self.config.dim**0.5

    def absolute(
        self, position_BT: Int[Array, 'B T'], dtype: jnp.dtype
    ) -> Float[Array, 'B T D'] | None:
        """Vectors of absolute positions; None where rotations stand for positions."""
        if self.config.positions == 'sinusoidal':
            return sinusoidal(position_BT, dim=self.config.dim).astype(dtype)
        if self.position_CD is None:
            return None
        position_CD = layout.gather(self.position_CD[...].astype(dtype), 'CD')
        return position_CD.at[position_BT].get(out_sharding=layout.act('BTD'))

    def _embedded(
        self,
        token_BT: jax.Array,
        position_BT: jax.Array,
        compute: Compute,
        keys: jax.Array | None,
    ) -> jax.Array:
        dtype = precision.dtype(compute.precision)
        x_BTD = self.embed(jax.reshard(token_BT, layout.act('BT')), dtype)
        place_BTD = self.absolute(position_BT, dtype)
        if place_BTD is not None:
            x_BTD = x_BTD + place_BTD
        return drop(x_BTD, self.config.dropout, None if keys is None else keys[0])

    def _rotation(
        self,
        position_BT: jax.Array,
        segment_BT: jax.Array | None,
        length_B: jax.Array | None = None,
    ) -> Rotation | None:
        if self.config.positions != 'rope':
            return None
        return rotation_of(self.config, position_BT, segment_BT=segment_BT, length_B=length_B)

    def logits(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """Float32 logits of `features`. Training never forms them whole: objectives/softmax.py."""
        head_VD = plain_in_use(self.head(), 'VD', x_BTD.dtype)
        logits_BTV = product('BTD,VD->BTV', x_BTD, head_VD, dtype=jnp.float32)
        return without_padding(self.config, logits_BTV)

    def head(self) -> nnx.Param:
        """Output head [V, D], at rest: the embedding itself when tied."""
        return self.embed_VD if self.head_VD is None else self.head_VD


def without_padding(
    config: ModelConfig, logits_BTV: Float[Array, 'B T V']
) -> Float[Array, 'B T V']:
    """The logits, -inf for rows of the vocabulary that no token has."""
    if not config.vocab_padding:
        return logits_BTV
    return jnp.where(jnp.arange(config.vocab) < config.ids, logits_BTV, -jnp.inf)


def _learned_positions(config: ModelConfig, key: jax.Array) -> nnx.Param | None:
    if config.positions != 'learned':
        return None
    return nnx.Param(fan_in(key, (config.context, config.dim), width_of(config).base))


def _places(
    token_BT: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None,
    at_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Positions and segments, or their defaults: one document, from its beginning or `at_B` on."""
    if position_BT is None:
        start = 0 if at_B is None else at_B[:, None]
        position_BT = jnp.broadcast_to(start + jnp.arange(token_BT.shape[1]), token_BT.shape)
    if segment_BT is None:
        segment_BT = jnp.ones_like(token_BT)
    # Costs nothing where they lie so already; plain arrays are welcome too.
    return jax.reshard(position_BT, layout.act('BT')), jax.reshard(segment_BT, layout.act('BT'))

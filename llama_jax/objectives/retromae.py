"""RetroMAE (Xiao et al. 2022): a text is written again from one vector, so that the vector has to
hold it.

Letter of this file: S positions that a position reads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout
from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.attention import Attention
from llama_jax.model.block import drop
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.masks import Visibility
from llama_jax.model.mlp import feed_forward
from llama_jax.model.norm import norm
from llama_jax.model.rope import rotation_of
from llama_jax.model.transformer import Transformer
from llama_jax.model.width import width_of
from llama_jax.objectives.asked import Reading
from llama_jax.objectives.base import ALONE, Base, Batch, Context, Loss, after_begin
from llama_jax.objectives.flops import TRAINING, head, layer
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.prediction import check_architecture
from llama_jax.objectives.softmax import cross_entropy


@dataclass(frozen=True)
class RetroMAE(Base):
    """Masked language modelling of the backbone, whose vector of the text a decoder of one layer
    reads, which predicts every token from that vector, its position and some of the other tokens,
    others for each position (enhanced decoding, section 3.3). The loss is the sum of both means.
    Weight is one per token that the decoder predicts.

    A begin token stands before each piece of the document. The decoder shares embedding and head
    with the backbone. It is a part of the training alone.
    """

    rate: float = 0.3
    """Share of the tokens that are masked for the backbone (0.15 to 0.3 in the paper)."""
    decoder_rate: float = 0.5
    """Share of the other tokens that a position of the decoder does not read (0.5 to 0.7)."""
    pool: Literal['first', 'mean'] = 'first'
    """The vector: what the backbone makes of the begin token, or the mean over all tokens, which is
    what the tasks of this project read."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(
                f'--objective.rate {self.rate}: that of masked tokens must be in (0, 1)'
            )
        if not 0 < self.decoder_rate <= 1:
            raise UserError(f'--objective.decoder-rate {self.decoder_rate}: it must be in (0, 1]')

    @property
    def marks(self) -> bool:
        return True

    @property
    def causal(self) -> bool:
        return False

    @property
    def accumulates(self) -> bool:
        """The backbone's loss is a mean over masked tokens, of which microbatches have more or
        fewer."""
        return False

    @property
    def reading(self) -> Reading:
        """The backbone is a masked language model."""
        return self.masked.reading

    @property
    def masked(self) -> MaskedLM:
        """What the backbone is trained by."""
        return MaskedLM(rate=self.rate)

    def lengths(self, seq_len: int) -> dict[str, int]:
        return after_begin(seq_len)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return (n + 1,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """That of masked language modelling: its targets are what the decoder reads and writes."""
        return self.masked.example(piece, tokenizer=tokenizer, seq_len=seq_len, rng=rng)

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        state = nnx.state(Decoder(model, key=key), nnx.Param)
        return {'decoder': nnx.to_pure_dict(state)}

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        *,
        extra: Params,
        compute: Compute,
        key: jax.Array | None,
        context: Context = ALONE,
    ) -> Loss:
        """Without a key (validation) there is no dropout, and the decoder always reads the same."""
        drawn_key, model_key, decoder_key = jax.random.key(0), None, None
        if key is not None:
            drawn_key, model_key, decoder_key = jax.random.split(key, 3)
        target_BT, segment_BT, position_BT = (
            batch[name] for name in ('targets', 'segments', 'positions')
        )
        x_BTD = self.masked.read(model, batch, compute=compute, key=model_key)
        head_VD, padding = model.head()[...], model.config.vocab_padding
        encoder = cross_entropy(x_BTD, head_VD, target_BT, batch['weights'], 0.0, padding)

        y_BTD = bound(model.config, extra['decoder'])(
            model,
            # Of the size that features have at the base, beside embeddings.
            self.vectors(x_BTD, segment_BT, position_BT) / width_of(model.config).out,
            target_BT,
            position_BT=position_BT,
            segment_BT=segment_BT,
            seen_BTS=seen(segment_BT, position_BT, drawn_key, rate=self.decoder_rate),
            compute=compute,
            key=decoder_key,
        )
        # The begin token is given.
        weight_BT = ((segment_BT > 0) & (position_BT > 0)).astype(jnp.float32)
        decoder = cross_entropy(y_BTD, head_VD, target_BT, weight_BT, 0.0, padding)

        n_decoder, n_encoder = jnp.sum(weight_BT), jnp.sum(batch['weights'])
        # Each loss is a mean over its own tokens; the sums have one weight.
        ratio = n_decoder / jnp.maximum(n_encoder, 1)
        return Loss(
            total=ratio * encoder.total + decoder.total,
            weight=n_decoder,
            metrics={
                'encoder_nll': ratio * encoder.nll,
                'encoder_accuracy': ratio * encoder.correct,
                'decoder_nll': decoder.nll,
                'decoder_accuracy': decoder.correct,
            },
        )

    def vectors(
        self,
        x_BTD: Float[Array, 'B T D'],
        segment_BT: Int[Array, 'B T'],
        position_BT: Int[Array, 'B T'],
    ) -> Float[Array, 'B T D']:
        """At each token the vector of its text."""
        of_text_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
        if self.pool == 'first':
            read_BTS = (of_text_BTS & (position_BT == 0)[:, None, :]).astype(x_BTD.dtype)
        else:
            read_BTS = of_text_BTS / jnp.sum(of_text_BTS, axis=-1, keepdims=True)
            read_BTS = read_BTS.astype(x_BTD.dtype)
        # A product that picks has to give what it picks.
        return jnp.einsum('BTS,BSD->BTD', read_BTS, x_BTD, precision='highest')

    def loss_tokens(self, batch: Batch) -> int:
        decoded = np.count_nonzero((batch['segments'] > 0) & (batch['positions'] > 0))
        return int(decoded) + int(np.count_nonzero(batch['weights']))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of the backbone, of the layer, of the head for both, and of bringing the vector to each
        token, a product with what has no gradient; for a row that one text fills."""
        written = (seq_len - 1) / seq_len
        decoder = TRAINING * (layer(model, seq_len) + written * head(model))
        masked = self.masked.flops(model, seq_len) + self.masked.skipped_flops(model, seq_len)
        return masked + decoder + 4 * seq_len * model.dim

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'RetroMAE', encoder=False)


class Decoder(nnx.Module):
    """One layer, whose queries are made of something else than its keys and values, and a norm."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.config = config
        self.attention_norm = norm(config)
        self.context_norm = norm(config)
        self.attention = Attention(config, sublayers=2, key=attention_key)
        self.mlp_norm = norm(config)
        self.mlp = feed_forward(config, sublayers=2, key=mlp_key)
        self.norm = norm(config, scale=width_of(config).out)

    def __call__(
        self,
        model: Transformer,
        vector_BTD: Float[Array, 'B T D'],
        token_BT: Int[Array, 'B T'],
        *,
        position_BT: Int[Array, 'B T'],
        segment_BT: Int[Array, 'B T'],
        seen_BTS: Bool[Array, 'B T S'],
        compute: Compute,
        key: jax.Array | None,
    ) -> Float[Array, 'B T D']:
        """What the head reads at each position (equations 6 to 8). Queries are the vector of the
        text with the position; keys and values are the vector, in place of the begin token, and
        the embeddings of the tokens that are seen."""
        config = self.config
        keys = [None] * 2 if key is None else list(jax.random.split(key))
        dtype = vector_BTD.dtype
        place_BTD = model.absolute(position_BT, dtype)
        if place_BTD is None:
            place_BTD = jnp.zeros((), dtype)
        first_BT1 = (position_BT == 0)[..., None]
        context_BTD = jnp.where(first_BT1, vector_BTD, model.embed(token_BT, dtype) + place_BTD)
        rope = None
        if config.positions == 'rope':
            rope = rotation_of(config, position_BT, segment_BT=segment_BT)
        x_BTD = vector_BTD + place_BTD
        update_BTD, _ = self.attention(
            self.attention_norm(x_BTD),
            rope=rope,
            memory=self.context_norm(context_BTD),
            memory_rope=rope,
            visible=Drawn(segment_BT, segment_BT, causal=False, seen_BTS=seen_BTS),
            compute=dataclasses.replace(compute, attention='reference'),
        )
        x_BTD += drop(update_BTD, config.dropout, keys[0])
        x_BTD += drop(self.mlp(self.mlp_norm(x_BTD)), config.dropout, keys[1])
        return self.norm(x_BTD)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn(Visibility):
    """What is seen is given whole, as only the backend 'reference' can take it."""

    seen_BTS: Bool[Array, 'B T S'] | None = None

    def dense(self) -> Bool[Array, 'B T S']:
        assert self.seen_BTS is not None
        return self.seen_BTS


def bound(config: ModelConfig, params: Params) -> Decoder:
    """The decoder that computes with `params`."""
    decoder = nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))
    nnx.update(decoder, params)
    return decoder


def seen(
    segment_BT: Int[Array, 'B T'], position_BT: Int[Array, 'B T'], key: jax.Array, *, rate: float
) -> Bool[Array, 'B T S']:
    """What each position reads: the place of the vector, and of the other tokens of its text, not
    itself, each with the probability 1 - `rate`. Without text, itself alone."""
    B, T = segment_BT.shape
    uniform_BTS = jax.random.uniform(key, (B, T, T), out_sharding=layout.act('BTS'))
    itself_TS = jnp.eye(T, dtype=bool)
    of_text_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
    is_vector_BTS = (position_BT == 0)[:, None, :]
    read_BTS = of_text_BTS & (is_vector_BTS | (uniform_BTS >= rate) & ~itself_TS)
    return jnp.where((segment_BT > 0)[..., None], read_BTS, itself_TS)

"""Contrastive learning: two views of a text are each other's nearest in a batch (InfoNCE, van den
Oord et al. 2018).

Letter of this file: M places for a pair in a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout, mesh
from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.asked import NOTHING, Reading
from llama_jax.objectives.base import ALONE, Base, Batch, Context, Loss, in_stream
from llama_jax.objectives.flops import features_flops
from llama_jax.objectives.info_nce import info_nce
from llama_jax.objectives.prediction import check_architecture

TEXT = 256
"""Tokens of a document from which one pair is made (Izacard et al. 2022, section 3)."""
CROP = 0.05, 0.5
"""Shortest and longest crop as a share of that text (same, appendix A.1)."""
PLACE = 8
"""Positions of a view's row for each of its places for a pair, so that short documents fill it."""
PLACES = 4
"""Places at least, for short rows."""
MIN_TEMPERATURE = 0.01
"""Lower bound of a learned temperature (Radford et al. 2021, section 2.5)."""
DOCUMENT = 'document'
"""The array with the document's id, which tells texts that are no negatives of each other."""
SPLIT = 1 << 26
"""Values of the first of the two numbers that a draw is split into."""


@dataclass(frozen=True)
class InfoNCE(Base):
    """Mean-pooled unit vectors of two views; cross-entropy of cos / temperature in both directions.

    The negatives of a text are all other texts of the global batch, but for those of the same
    document and of its duplicates. Weight is one per pair. Without dropout (validation) the views
    'dropout' of a text are equal.
    """

    views: Literal['spans', 'dropout', 'shared'] = 'spans'
    """'spans': two random crops, each independent of the other (Contriever, Izacard et al. 2022).
    'dropout': the text twice, under two dropout masks (SimCSE, Gao et al. 2021).
    'shared': as a part of a sum, two random crops of what the first part's pass makes of the piece,
    at no further cost; each crop has been read after what stands before it."""
    temperature: float = 0.05
    learned: bool = False
    """The temperature is a parameter, and `temperature` its initial value (Radford et al. 2021)."""
    chunks: int = 1
    """The rows are encoded in this many chunks, one after another, and again in the backward pass:
    memory for activations is that of one chunk (Gao et al. 2021b, gradient cache)."""
    bidirectional: bool = True
    """Every token sees its whole view. False: those before it, as in a causal model. Views 'shared'
    are read as the first part of the sum reads."""
    same_dropout: bool = False
    """Both views under one dropout mask, which the paper shows to fail (SimCSE, section 3)."""
    delete: float = 0.0
    """Chance of each token of a crop to be left out (Contriever's recipe: 0.1)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f'--objective.temperature {self.temperature}: it must be positive')
        if self.chunks < 1:
            raise UserError(f'{self.chunks} chunks: the batch is encoded in 1 or more')
        if not 0 <= self.delete < 1:
            raise UserError(f'--objective.delete is {self.delete}: it must be in [0, 1)')
        if self.delete and self.views != 'spans':
            raise UserError(
                f"--objective.delete has no effect with views '{self.views}', which are no crops "
                'with a row of their own: leave it out'
            )
        if self.joins and (self.chunks > 1 or self.same_dropout):
            raise UserError(
                "chunks and same_dropout have no effect with views 'shared', which encode nothing: "
                'leave them out'
            )

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def accumulates(self) -> bool:
        return False

    @property
    def reading(self) -> Reading:
        # Views are texts of their own, but where they lie in a row of another part.
        return NOTHING._replace(text=False, begins=self.joins)

    @property
    def joins(self) -> bool:
        return self.views == 'shared'

    def lengths(self, seq_len: int) -> dict[str, int]:
        """Half of the row for each view; views 'shared' have no row."""
        if self.joins:
            return {}
        if seq_len % 2 or not seq_len:
            raise UserError(
                f'a row of {seq_len} positions cannot be halved for two views: make it even'
            )
        return {'a': seq_len // 2, 'b': seq_len // 2}

    def segments(self, seq_len: int) -> int:
        """Places for pairs, each a row and a column of the table of cosines."""
        return places_in(seq_len if self.joins else seq_len // 2)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        """Views 'dropout': the text. 'spans': lengths of crops, uniform as `draw` is."""
        if self.joins:
            return ()
        longest = self._longest(seq_len)
        if self.views == 'dropout':
            return (n, n) if n <= longest else None
        if n > TEXT:
            return None
        shortest, longest = (max(1, min(round(share * n), longest)) for share in CROP)
        lengths = longest - shortest + 1
        # One number in [0, 1) is two: its first binary digits, and those that follow.
        b, a = math.modf(draw * SPLIT)
        return shortest + int(a / SPLIT * lengths), shortest + int(b * lengths)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """A pair of views of the piece, and the document's id."""
        a = b = text = piece.text
        if not len(text):
            return None
        if self.views == 'spans':
            a, b = (self._thinned(crop(text, length, rng), rng) for length in piece.sizes)
        document = np.full(len(a), piece.identity, np.int32)
        return in_stream('a', {'inputs': a, DOCUMENT: document}) | in_stream('b', {'inputs': b})

    def _thinned(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Without the tokens that are deleted; one stays."""
        if not self.delete:
            return tokens
        kept = rng.random(len(tokens)) >= self.delete
        return tokens[kept] if kept.any() else tokens[:1]

    def beside(self, example: Example, piece: Piece, *, rng: np.random.Generator) -> Example | None:
        """Which positions are of the crops, and the document's id."""
        n = len(example['inputs'])
        shortest, longest = (max(1, round(share * n)) for share in CROP)
        crops = (crop(np.arange(n), int(rng.integers(shortest, longest + 1)), rng) for _ in 'ab')
        of_a, of_b = (np.isin(np.arange(n), positions).astype(np.int32) for positions in crops)
        return {'a': of_a, 'b': of_b, DOCUMENT: np.full(n, piece.identity, np.int32)}

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        return {'log_temperature': jnp.log(jnp.float32(self.temperature))} if self.learned else {}

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
        key_a, key_b = (None, None) if key is None else jax.random.split(key)
        if self.same_dropout:
            key_b = key_a
        if self.joins:
            if context.features is None:
                raise UserError("views 'shared' are for a part of a sum, whose pass they read")
            place_BMT, document_BT = places(batch['segments']), batch[DOCUMENT]
            a_BMD, b_BMD = (
                pooled(context.features, place_BMT & (batch[view] > 0)[:, None]) for view in 'ab'
            )
        else:
            place_BMT, document_BT = places(batch['a/segments']), batch[f'a/{DOCUMENT}']
            a_BMD = self.encode(model, batch, 'a', compute=compute, key=key_a)
            b_BMD = self.encode(model, batch, 'b', compute=compute, key=key_b)
        temperature = jnp.float32(self.temperature)
        if self.learned:
            temperature = jnp.exp(_bounded(extra['log_temperature']))
        sums = info_nce(
            a_BMD,
            b_BMD,
            document_BM=at_places(document_BT, place_BMT),
            valid_BM=jnp.any(place_BMT, axis=-1),
            temperature=temperature,
        )
        metrics = {
            'accuracy': sums.correct,
            'alignment': sums.alignment,
            'uniformity': sums.weight * sums.uniformity,
            'candidates': sums.candidates,
        }
        if self.learned:
            metrics['temperature'] = sums.weight * temperature
        return Loss(sums.total, sums.weight, metrics)

    def loss_tokens(self, batch: Batch) -> int:
        """Pairs: the loss has one term for each."""
        return int(batch['segments' if self.joins else 'a/segments'].max(axis=1).sum())

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        if self.joins:
            return 0.0
        return features_flops(model, seq_len // 2, causal=self.causal)

    def check(self, model: ModelConfig) -> None:
        if self.joins and not self.bidirectional:
            raise UserError(
                "--objective.bidirectional has no effect with views 'shared', which are read as "
                'the first part of the sum reads: leave it out'
            )
        # Under one mask for both they are equal anyway: that is how no dropout at all is compared.
        if self.views == 'dropout' and model.dropout == 0 and not self.same_dropout:
            raise UserError(
                'contrastive views by dropout are equal where model.dropout is 0: set '
                '--model.dropout 0.1, or --objective.views spans'
            )
        if self.views == 'spans' and model.dropout == 0 and self.same_dropout:
            raise UserError(
                '--objective.same-dropout has no effect where model.dropout is 0: leave it out, or '
                'set --model.dropout 0.1'
            )
        check_architecture(model, 'contrastive learning', encoder=False)

    def _longest(self, seq_len: int) -> int:
        """Tokens of the longest view."""
        return min(round(CROP[1] * TEXT) if self.views == 'spans' else TEXT, seq_len // 2)

    def encode(
        self,
        model: Transformer,
        batch: Batch,
        view: Literal['a', 'b'],
        *,
        compute: Compute,
        key: jax.Array | None,
    ) -> Float[Array, 'B M D']:
        """Unit vectors of one view; 0 where a row has no pair."""
        token_BT, position_BT, segment_BT = (
            batch[f'{view}/{name}'] for name in ('inputs', 'positions', 'segments')
        )
        return text_vectors(
            *(model, token_BT, position_BT, segment_BT),
            n=places_in(segment_BT.shape[1]),
            causal=self.causal,
            chunks=self.chunks,
            compute=compute,
            key=key,
        )


def text_vectors(
    model: Transformer,
    token_BT: Int[Array, 'B T'],
    position_BT: Int[Array, 'B T'],
    segment_BT: Int[Array, 'B T'],
    *,
    n: int,
    causal: bool,
    chunks: int,
    compute: Compute,
    key: jax.Array | None,
) -> Float[Array, 'B M D']:
    """Unit vectors of the texts 1 to `n` of each row, of which M = n; 0 for one that is not there.
    `chunks`: see InfoNCE."""

    def encode(rows: tuple[jax.Array, ...], key: jax.Array | None) -> jax.Array:
        token_BT, position_BT, segment_BT = rows
        x_BTD, _ = model.features(
            token_BT,
            position_BT=position_BT,
            segment_BT=segment_BT,
            causal=causal,
            compute=compute,
            key=key,
        )
        return pooled(x_BTD, places(segment_BT, n))

    rows = token_BT, position_BT, segment_BT
    if chunks == 1:
        return encode(rows, key)
    keys = None if key is None else jax.random.split(key, chunks)
    pieces = tuple(_cut(x_BT, chunks) for x_BT in rows)
    return layout.joined(jax.lax.map(lambda piece: jax.checkpoint(encode)(*piece), (pieces, keys)))


def crop(text: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of `text`, of `length` tokens or of all that there are."""
    start = int(rng.integers(max(len(text) - length, 0) + 1))
    return text[start : start + length]


def places_in(length: int) -> int:
    """Places of a row of this many positions of one stream."""
    return max(PLACES, length // PLACE)


def places(segment_BT: Int[Array, 'B T'], n: int | None = None) -> Bool[Array, 'B M T']:
    """Which tokens belong to the pair of each place: segment m + 1 is that of place m. `n`: places,
    as `places_in` says by default."""
    segment_M = jnp.arange(1, (n or places_in(segment_BT.shape[1])) + 1)
    return segment_BT[:, None] == segment_M[:, None]


def at_places(x_BT: jax.Array, place_BMT: Bool[Array, 'B M T']) -> jax.Array:
    """What all tokens of each place have alike [B, M], 0 or more; 0 of a place without tokens."""
    return jnp.max(jnp.where(place_BMT, x_BT[:, None], 0), axis=-1)


def pooled(x_BTD: Float[Array, 'B T D'], place_BMT: Bool[Array, 'B M T']) -> jax.Array:
    """Mean of the tokens of each place, as a unit vector in float32 [B, M, D]; 0 for no token."""
    sum_BMD = jnp.einsum(
        'BMT,BTD->BMD', place_BMT.astype(jnp.float32), x_BTD.astype(jnp.float32)
    )  # the length of the sum is divided out anyway, so no mean is taken
    square_BM1 = jnp.sum(jnp.square(sum_BMD), axis=-1, keepdims=True)
    return sum_BMD * jax.lax.rsqrt(jnp.maximum(square_BM1, 1e-12))


def _bounded(log_temperature: jax.Array) -> jax.Array:
    """At least the bound; its gradient passes, so that it can leave the bound again."""
    missing = jax.nn.relu(math.log(MIN_TEMPERATURE) - log_temperature)
    return log_temperature + jax.lax.stop_gradient(missing)


def _cut(x_BT: jax.Array, n: int) -> jax.Array:
    """[B, T] -> [n, B / n, T]; chunk i takes rows i, i + n, ...: each device its own."""
    B = len(x_BT)
    shards = mesh.batch_shards(jax.sharding.get_abstract_mesh())
    if B % (n * shards):
        raise UserError(
            f'{n} chunks of a batch of {B} rows on {shards} shards are no whole rows: change '
            '--objective.chunks'
        )
    return layout.interleaved(x_BT, n)

"""Dense retrieval: a query is nearer to the passage that answers it than to others, hard negatives
among them (DPR, Karpukhin et al. 2020).

Letters of this file: M places for a query in a row; P texts of a query: itself, a passage that
answers it, and hard negatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.pieces import Encoded, Example, Piece, Sizes, identity_of
from llama_jax.data.record import BadRecordError, QueryPassages, Record
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.asked import NOTHING, Reading
from llama_jax.objectives.base import ALONE, Base, Batch, Context, Loss
from llama_jax.objectives.classify import shortened
from llama_jax.objectives.contrastive import PLACE, PLACES, at_places, places, text_vectors
from llama_jax.objectives.flops import features_flops
from llama_jax.objectives.in_batch import ranked
from llama_jax.objectives.prediction import check_architecture
from llama_jax.text.chat import ChatFormat
from llama_jax.text.vocabulary import Vocabulary

TEXT, OFFSET, IDENTITY = 'text', 'offset', 'identity'
"""Arrays that say of each token: which text of its record it is in (0 the query, 1 the passage that
answers it, then hard negatives), where in it, and which texts are equal."""


@dataclass(frozen=True)
class DenseRetrieval(Base):
    """Cross-entropy of the passage that answers a query, by cos / temperature of mean-pooled unit
    vectors, among the passages of the global batch (in_batch.py). Weight is one per query.

    A record gives one of its positives and some of its hard negatives, drawn anew in each epoch.
    Each text is read by itself, after a begin token. All texts of a record stand one after another
    in one row; where they are too long for it, the longest lose their ends.
    """

    negatives: int = 1
    """Hard negatives of a query at most: of more, so many are drawn. Those of the other queries are
    its negatives as well."""
    temperature: float = 0.05
    query_prefix: str = ''
    """Stands before every query, such as 'query: ' (E5, Wang et al. 2022, section 4.3)."""
    passage_prefix: str = ''
    """The same for passages, such as 'passage: '."""
    longest: int = 0
    """Tokens of a text that are read, its end is left out. 0: all."""
    bidirectional: bool = True
    """Every token sees its whole text. False: those before it, as in a causal model."""
    chunks: int = 1
    """The rows are encoded in this many chunks, see InfoNCE: for more queries in a batch."""

    predicts: ClassVar[bool] = False
    """There is nothing to write in answer to a record."""

    def __post_init__(self) -> None:
        if self.negatives < 0:
            raise UserError(f'--objective.negatives is {self.negatives}: it must be 0 or more')
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f'--objective.temperature is {self.temperature}: it must be positive')
        if self.longest < 0:
            raise UserError(f'--objective.longest is {self.longest}: it must be 0 or more')
        if self.chunks < 1:
            raise UserError(f'{self.chunks} chunks: the batch is encoded in 1 or more')

    @property
    def reads(self) -> type[Record]:
        return QueryPassages

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def accumulates(self) -> bool:
        return False

    @property
    def reading(self) -> Reading:
        return NOTHING._replace(text=False)

    @property
    def encoding(self) -> tuple[Any, ...]:
        return self.query_prefix, self.passage_prefix, self.longest

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        """A part for the query, for each positive and for each negative; the number is that of the
        positives. Raises BadRecordError for a text without tokens."""
        begin = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
        texts = [
            self.query_prefix + record.query,
            *(self.passage_prefix + text for text in (*record.positives, *record.negatives)),
        ]
        parts = [np.array([*begin, *vocabulary.encode(text)], np.int32) for text in texts]
        if self.longest:
            parts = [part[: self.longest] for part in parts]
        if min(map(len, parts)) <= len(begin):
            raise BadRecordError('a text has no token')
        weights = tuple(np.ones(len(part), np.float32) for part in parts)
        return Encoded(tuple(parts), weights, float(len(record.positives)))

    def lengths(self, seq_len: int) -> dict[str, int]:
        return {'': seq_len}

    def whole(self, lengths: tuple[int, ...], *, seq_len: int) -> Sizes | None:
        """Of the query and its longest passages: which of them is drawn is not known here."""
        query, *passages = lengths
        return (query + sum(sorted(passages, reverse=True)[: 1 + self.negatives]),)

    def segments(self, seq_len: int) -> int:
        """Places for queries."""
        return max(PLACES, seq_len // (PLACE * self.texts))

    @property
    def texts(self) -> int:
        """Of a query, at most."""
        return 2 + self.negatives

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The query, a positive and hard negatives, one after another."""
        assert piece.encoded is not None
        query, *passages = (part for part in piece.encoded.parts if len(part))
        n_positives = int(piece.encoded.number)
        positives, negatives = passages[:n_positives], passages[n_positives:]
        n_drawn = min(self.negatives, len(negatives))
        drawn = rng.choice(len(negatives), n_drawn, replace=False) if n_drawn else ()
        chosen = [query, positives[int(rng.integers(n_positives))], *(negatives[i] for i in drawn)]
        texts = shortened(tuple(chosen), piece.sizes[0])
        if not all(map(len, texts)):
            return None
        sizes = [len(text) for text in texts]
        # Of the whole text, for one that was cut is still the same.
        identities = [identity_of(text) for text in chosen]
        return {
            'inputs': np.concatenate(texts).astype(np.int32),
            TEXT: np.repeat(np.arange(len(texts), dtype=np.int32), sizes),
            OFFSET: np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
            IDENTITY: np.repeat(np.array(identities, np.int32), sizes),
        }

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
        segment_BT, P = batch['segments'], self.texts
        B, T = segment_BT.shape
        M = self.segments(T)
        text_BT = jnp.where(segment_BT > 0, (segment_BT - 1) * P + batch[TEXT] + 1, 0)
        vector_BMD = text_vectors(
            *(model, batch['inputs'], batch[OFFSET], text_BT),
            n=M * P,
            causal=self.causal,
            chunks=self.chunks,
            compute=compute,
            key=key,
        )
        place_BMT = places(text_BT, M * P)
        id_BM = at_places(batch[IDENTITY], place_BMT)
        valid_BM = jnp.any(place_BMT, axis=-1)
        vector_BMPD = vector_BMD.reshape(B, M, P, -1)
        id_BMP, valid_BMP = (x_BM.reshape(B, M, P) for x_BM in (id_BM, valid_BM))
        sums = ranked(
            vector_BMPD[:, :, 0],
            vector_BMPD[:, :, 1:],
            query_id_BM=id_BMP[..., 0],
            passage_id_BMP=id_BMP[..., 1:],
            valid_BM=valid_BMP[..., 0],
            valid_BMP=valid_BMP[..., 1:],
            temperature=self.temperature,
        )
        metrics = {'accuracy': sums.correct, 'candidates': sums.candidates}
        return Loss(sums.total, sums.weight, metrics)

    def loss_tokens(self, batch: Batch) -> int:
        """Queries: the loss has one term for each."""
        return int(batch['segments'].max(axis=1).sum())

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return features_flops(model, seq_len, causal=self.causal)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'dense retrieval', encoder=False)

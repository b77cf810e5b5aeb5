"""Two answers to one prompt, as examples: what objectives share that read preferences.

Each answer is a sequence of its own behind the same prompt, in a stream of its own. Letter of this
file: M places for a pair in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import layout
from llama_jax.data.pieces import Encoded, Example, Piece, Sizes
from llama_jax.data.record import BadRecordError, Preference, Prompt, Record
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.base import Base, Batch, Loss, in_stream
from llama_jax.objectives.contrastive import places, places_in
from llama_jax.objectives.instruct import turns_in
from llama_jax.objectives.prediction import check_architecture, predicted
from llama_jax.text.chat import ChatFormat
from llama_jax.text.vocabulary import Vocabulary

CHOSEN, REJECTED = 'chosen', 'rejected'
STREAMS = (CHOSEN, REJECTED)


@dataclass(frozen=True)
class Pairs(Base):
    """A pair takes a place in both streams, each of which has half of the row. The weight is 1 on
    the tokens of an answer, the end of its turn (of plain text: the end of the text) included, and
    0 on the prompt. Where a pair is cut to fit, both answers lose their ends, never the prompt that
    they share; a pair that is equal then, or an answer that is gone, gives no example.
    """

    predicts: ClassVar[bool] = True
    """Tokens are predicted, so that the last one is a target only."""

    @property
    def reads(self) -> type[Record]:
        return Preference

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        answers = (record.chosen, record.rejected)
        made = [answered(record.prompt, answer, vocabulary, chat) for answer in answers]
        ids, weights = zip(*made, strict=True)
        for name, weight in zip(STREAMS, weights, strict=True):
            if not weight.any():
                raise BadRecordError(f'{name} has no token')
        if np.array_equal(ids[0], ids[1]):
            raise BadRecordError('chosen and rejected are equal as token ids')
        before = [
            part[: int(np.argmax(weight > 0))] for part, weight in zip(ids, weights, strict=True)
        ]
        if not np.array_equal(before[0], before[1]):
            raise BadRecordError(
                'the chat template writes the prompt otherwise before one answer than before the '
                'other: the difference would not be the answer alone'
            )
        return Encoded(ids, weights, record.margin)

    def whole(self, lengths: tuple[int, ...], *, seq_len: int) -> Sizes | None:
        chosen, rejected = lengths
        return chosen - self.predicts, rejected - self.predicts

    def lengths(self, seq_len: int) -> dict[str, int]:
        """Half of the row for each answer."""
        if seq_len % 2 or not seq_len:
            raise UserError(
                f'a row of {seq_len} positions cannot be halved for two answers: make it even'
            )
        return dict.fromkeys(STREAMS, seq_len // 2)

    def segments(self, seq_len: int) -> int:
        return places_in(seq_len // 2)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """What `arrays` makes of both answers, cut to fit."""
        assert piece.encoded is not None
        example: Example = {}
        kept: list[np.ndarray] = []
        for name, ids, weights, size in zip(
            STREAMS, piece.encoded.parts, piece.encoded.weights, piece.sizes, strict=True
        ):
            n = size + self.predicts
            kept.append(ids[:n].astype(np.int32))
            if not weights[:n].any():
                return None
            example |= in_stream(name, self.arrays(kept[-1], weights[:n].astype(np.float32)))
        return None if np.array_equal(kept[0], kept[1]) else example

    def arrays(self, ids: np.ndarray, weights: np.ndarray) -> Example:
        """Of a prompt with an answer: inputs, targets, and the weight of each target."""
        return {**predicted(ids[:-1], ids[1:]), 'weights': weights[1:]}

    def loss_tokens(self, batch: Batch) -> int:
        return sum(int(np.count_nonzero(batch[f'{name}/weights'])) for name in STREAMS)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'learning from preferences', encoder=False)


def answered(
    prompt: Prompt, answer: Prompt, vocabulary: Vocabulary, chat: ChatFormat | None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] of a prompt and an answer to it, and the weight of each: 1 on the answer.

    The prompt's ids are those that a model is asked with, whatever follows: an answer is never
    merged with it into a token. Raises BadRecordError where the record cannot be written so.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        begin = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
        before = [*begin, *vocabulary.encode(prompt)]
        own = [*vocabulary.encode(answer, continues=bool(prompt)), vocabulary.eos_id]
        ids = np.array([*before, *own], np.int32)
        return ids, np.repeat(np.array([0, 1], np.float32), [len(before), len(own)])
    if isinstance(prompt, str) or isinstance(answer, str):
        raise BadRecordError('of prompt and answers one is a text, and the other messages')
    messages = (*prompt, *answer)
    learnt = [
        i for i in range(len(prompt), len(messages)) if messages[i].get('role') == 'assistant'
    ]
    if not learnt:
        raise BadRecordError('an answer has no message of the assistant')
    found = turns_in(messages, learnt, vocabulary=vocabulary, chat=chat)
    weights = (found.message >= len(prompt)).astype(np.float32)
    # What a template writes behind the end of the turn is never written by the model.
    end = int(np.flatnonzero(weights).max(initial=-1)) + 1
    return found.ids[:end], weights[:end]


def features(
    model: Transformer, batch: Batch, *, compute: Compute, key: jax.Array | None
) -> jax.Array:
    """Normalised output of the model for both answers [2 B, T, D]: rows 2 b and 2 b + 1 are those
    of row b, on the device that has it."""
    x_BTD, _ = model.features(
        both(batch, 'inputs'),
        position_BT=both(batch, 'positions'),
        segment_BT=both(batch, 'segments'),
        compute=compute,
        key=key,
    )
    return x_BTD


def both(batch: Batch, name: str) -> jax.Array:
    """The arrays `name` [B, T] of both streams as one [2 B, T]."""
    x_B2T = jnp.stack([batch[f'{stream}/{name}'] for stream in STREAMS], axis=1)
    B, _, T = x_B2T.shape
    return jnp.reshape(x_B2T, (2 * B, T), out_sharding=layout.rows())


def by_pair(x_BT: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums over the tokens of each answer [B, M], of what `both` is like [2 B, T]: of the chosen
    answers, and of the rejected; 0 for a place without a pair."""
    B, T = batch[f'{CHOSEN}/segments'].shape
    place_BMT = places(both(batch, 'segments'))
    # A product with ones would be rounded to bfloat16 on some devices.
    x_BM = jnp.sum(jnp.where(place_BMT, x_BT[:, None], 0), axis=-1)
    x_B2M = jnp.reshape(x_BM, (B, 2, x_BM.shape[-1]), out_sharding=layout.rows())
    return x_B2M[:, 0], x_B2M[:, 1]


def facts(batch: Batch, name: str) -> jax.Array:
    """What the array `name` [B, T], which is constant in a segment, says of each pair [B, M]."""
    stream = name.rpartition('/')[0]
    first_BT = batch[f'{stream}/positions'] == 0
    place_BMT = places(batch[f'{stream}/segments']) & first_BT[:, None]
    return jnp.sum(jnp.where(place_BMT, batch[name][:, None], 0), axis=-1)


def summed(each_BM: jax.Array, metrics_BM: Mapping[str, jax.Array], batch: Batch) -> Loss:
    """The loss and metrics of each pair [B, M], summed over the places that have one; weight is one
    per pair."""
    pair_BM = jnp.any(places(batch[f'{CHOSEN}/segments']), axis=-1)

    def total(x_BM: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(pair_BM, x_BM, 0), dtype=jnp.float32)

    metrics = {name: total(x_BM) for name, x_BM in metrics_BM.items()}
    return Loss(total(each_BM), total(jnp.ones_like(each_BM)), metrics)

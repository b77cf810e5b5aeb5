"""Sequence to sequence by teacher forcing: a target is learnt, given its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.data.pieces import Encoded, Example, Piece, Sizes
from llama_jax.data.record import BadRecordError, Pair, Record
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.flops import decoder_flops, encoder_decoder_flops, prefix_flops
from llama_jax.objectives.instruct import following, turns_in
from llama_jax.objectives.prediction import ENCODER, TokenPrediction, check_architecture, denoising
from llama_jax.text.chat import ChatFormat
from llama_jax.text.turns import VERSION
from llama_jax.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class SequenceToSequence(TokenPrediction):
    """Likelihood of a target and of its end, given a source (Sutskever et al. 2014).

    A decoder reads a begin token, the source, `between` and the target in one row. An
    encoder-decoder reads the source in its encoder. Source and target are tokenised apart, so that
    the prompt of generation is what was trained on, whatever follows it.
    """

    z_loss: float = 0.0
    encoder: bool = False
    """Sources to the encoder of an encoder-decoder. False: both in one stream."""
    chat: bool = False
    """The source as a user's message and the target as the assistant's answer, in the chat format
    of the model. False: plain text."""
    between: str = ''
    """Between source and target in plain text of one stream, such as a line break, where the data
    itself does not tell where a source ends. It is given, not learnt."""
    prefix: bool = False
    """The source in full view (Raffel et al. 2020, section 3.2.1), where it stands in one stream
    with the target. False: every token sees what is before it."""
    share: float | None = None
    """Of the positions of a row, for the encoder. None: half."""

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < 1:
            raise UserError(
                f'--objective.share {self.share}: that of the encoder must be in (0, 1)'
            )
        if self.share is not None and not self.encoder:
            raise UserError('a share for the encoder has no effect without one: leave it out')
        for name in ('chat', 'between', 'prefix'):
            if self.encoder and getattr(self, name):
                raise UserError(
                    f'{name} has no effect where sources go to an encoder: leave it out'
                )
        if self.chat and self.between:
            raise UserError(
                'between has no effect in a chat, whose format says what stands there: leave it out'
            )

    @property
    def reads(self) -> type[Record]:
        return Pair

    @property
    def chats(self) -> bool:
        return self.chat

    @property
    def causal(self) -> bool:
        return not self.prefix

    @property
    def encoding(self) -> tuple[Any, ...]:
        return self.encoder, self.chat, self.between, VERSION

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        """Two parts: what is given, and the target with its end. `between` begins the second, of
        weight 0. Raises BadRecordError for an empty source or target."""
        for name in ('source', 'target'):
            if not getattr(record, name).strip():
                raise BadRecordError(f'{name} is empty')
        if self.chat:
            roles = {'user': record.source, 'assistant': record.target}
            messages = [{'role': role, 'content': text} for role, text in roles.items()]
            found = turns_in(messages, [1], vocabulary=vocabulary, chat=chat)
            n = int(np.argmax(found.message == 1))
            ids, weights = found.ids, (found.message == 1).astype(np.float32)
            return Encoded((ids[:n], ids[n:]), (weights[:n], weights[n:]))
        begin = [] if self.encoder or vocabulary.bos_id is None else [vocabulary.bos_id]
        source = np.array([*begin, *vocabulary.encode(record.source)], np.int32)
        between = [*vocabulary.encode(self.between, continues=True)] if self.between else []
        target = [*vocabulary.encode(record.target, continues=not self.encoder), vocabulary.eos_id]
        second = np.array([*between, *target], np.int32)
        learnt = np.repeat(np.array([0, 1], np.float32), [len(between), len(target)])
        return Encoded((source, second), (np.zeros(len(source), np.float32), learnt))

    def lengths(self, seq_len: int) -> dict[str, int]:
        if not self.encoder:
            return {'': seq_len}
        source = self._source(seq_len)
        if not 0 < source < seq_len:
            raise UserError(
                f'a row of {seq_len} positions has no room for an encoder and a decoder: raise the '
                'sequence length'
            )
        return {ENCODER: source, '': seq_len - source}

    def whole(self, lengths: tuple[int, ...], *, seq_len: int) -> Sizes | None:
        return lengths if self.encoder else (sum(lengths) - 1,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """Where a row is too short the source loses its end, and what is still too long of the
        target its own; a chat loses its end, for its middle is the template's."""
        assert piece.encoded is not None
        (source, target), weights = piece.encoded.parts, piece.encoded.weights
        if self.encoder:
            source, target = (
                part[:n] for part, n in zip((source, target), piece.sizes, strict=True)
            )
            return denoising(source, target, tokenizer=tokenizer, encoder=True)
        size = piece.sizes[0]
        if not self.chat:
            source = source[: max(size + 1 - len(target), 1)]
        ids = np.concatenate([source, target])
        learnt = np.concatenate([np.zeros(len(source), np.float32), weights[1]])
        example = following(ids, learnt, min(size, len(ids) - 1))
        if example is not None and self.prefix:
            place = np.arange(len(example['inputs']))
            example['prefix'] = (place < len(source)).astype(np.int32)
        return example

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of a row that one pair fills; the source is half of it."""
        if self.encoder:
            source = self._source(seq_len)
            return encoder_decoder_flops(model, source, seq_len - source)
        predicted = seq_len - seq_len // 2
        if self.prefix:
            return prefix_flops(model, seq_len, prefix=seq_len // 2, predicted=predicted)
        return decoder_flops(model, seq_len, causal=True, predicted=predicted)

    def check(self, model: ModelConfig) -> None:
        name = f'sequence to sequence with encoder={self.encoder}'
        check_architecture(model, name, encoder=self.encoder)

    def _source(self, seq_len: int) -> int:
        """Positions of a row for the encoder."""
        return round(seq_len * (0.5 if self.share is None else self.share))

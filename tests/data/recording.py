"""The smallest makers of examples of records, as a module so that worker processes find them."""

import dataclasses

import numpy as np

from llama_jax.data.pieces import Encoded
from llama_jax.data.record import BadRecordError, Chat, Pair
from tests.data.objective import Causal


@dataclasses.dataclass(frozen=True)
class Chats(Causal):
    """Messages one after another, each ended; the assistant's bear loss."""

    reads = Chat
    encoding = ()

    def encoded(self, record, *, vocabulary, chat):
        ids, weights = [], []
        for message, weight in zip(record.messages, record.weights, strict=True):
            text = [*vocabulary.encode(message['content']), vocabulary.eos_id]
            ids += text
            weights += [weight] * len(text)
        return Encoded((np.array(ids, np.int32),), (np.array(weights, np.float32),), 7.0)

    def whole(self, lengths, *, seq_len):
        return (lengths[0],)

    def sizes(self, n, *, seq_len, draw):
        raise AssertionError('records have the sizes of `whole`')

    def example(self, piece, *, tokenizer, seq_len, rng):
        (n,) = piece.sizes
        ((ids,), (weights,), number) = piece.encoded
        assert number == 7 and n <= len(ids)
        given = piece.given if piece.given is not None else [0.0]
        return {
            'inputs': np.concatenate([[tokenizer.bos_id], ids[: n - 1]]),
            'targets': ids[:n],
            'weights': weights[:n],
            'given': np.full(n, given[0], np.float32),
        }


class Odd(Chats):
    """Chats of an even number of tokens, which give no example otherwise."""

    def whole(self, lengths, *, seq_len):
        return None if lengths[0] % 2 else lengths


@dataclasses.dataclass(frozen=True)
class Pairs(Causal):
    """A source in one stream, its target in another."""

    reads = Pair
    lowered: bool = False

    @property
    def encoding(self):
        return (self.lowered,)

    def encoded(self, record, *, vocabulary, chat):
        if 'cursed' in record.source:
            raise BadRecordError('source is cursed')
        texts = (record.source, record.target)
        parts = tuple(vocabulary.encode(x.lower() if self.lowered else x) for x in texts)
        return Encoded(parts, tuple(np.ones(len(ids), np.float32) for ids in parts))

    def lengths(self, seq_len):
        return {'encoder': seq_len // 2, '': seq_len - seq_len // 2}

    def whole(self, lengths, *, seq_len):
        return lengths

    def example(self, piece, *, tokenizer, seq_len, rng):
        source, target = (ids[:n] for ids, n in zip(piece.encoded.parts, piece.sizes, strict=True))
        return {
            'encoder/inputs': source,
            'inputs': target,
            'targets': target,
            'weights': np.ones(len(target), np.float32),
        }


class Uneven(Pairs):
    """A mistake: one record has a part less than others."""

    def encoded(self, record, **context):
        made = super().encoded(record, **context)
        return Encoded(made.parts[:1], made.weights[:1]) if record.source == 'odd' else made

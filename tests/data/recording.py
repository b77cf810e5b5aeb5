"""Files of records, and the smallest makers of their examples, as a module so that worker processes
find them."""

import dataclasses
import itertools
import json

import numpy as np

from llama_jax.data.config import DataConfig, Source
from llama_jax.data.loader import Loader
from llama_jax.data.pieces import Encoded
from llama_jax.data.record import BadRecordError, Chat, Pair
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from tests.data.objective import Causal

TOKENIZER = bytes_tokenizer()
BATCH, SEQ_LEN = 4, 128
RNG = np.random.default_rng(0)


def chat(i, answer=None, **fields):
    answer = answer or 'x' * int(RNG.integers(1, 60))
    said = [('user', f'{i}?'), ('assistant', f'{i} {answer}')]
    return {'messages': [{'role': r, 'content': c} for r, c in said], **fields}


def pair(i):
    n = int(RNG.integers(1, 40))
    return {'source': f'{i}' + 's' * n, 'target': f'{i}' + 't' * (n // 2 + 1)}


def written(path, records):
    path.write_text(''.join(json.dumps(one, ensure_ascii=False) + '\n' for one in records), 'utf-8')
    return str(path)


def files(*paths, **settings):
    source = Source('text_files', files=tuple(map(str, paths)), split='all')
    return DataConfig(sources=(source,), **settings)


def load(config, maker, **settings):
    defaults = dict(split='train', tokenizer=TOKENIZER, batch=BATCH, seq_len=SEQ_LEN, seed=3)
    return Loader(config, maker=maker, **(defaults | settings))


def take(loader, n):
    with loader:
        return list(itertools.islice(loader, n))


def segments(batches, key='targets'):
    """The text of every segment of the rows."""
    stream = f'{key.rpartition("/")[0]}/'.lstrip('/')
    for batch in batches:
        for row, numbers in zip(batch[key], batch[f'{stream}segments'], strict=True):
            for number in range(1, numbers.max() + 1):
                yield TOKENIZER.decode(row[numbers == number])


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
    """One record has a part less than others."""

    def encoded(self, record, **context):
        made = super().encoded(record, **context)
        return Encoded(made.parts[:1], made.weights[:1]) if record.source == 'odd' else made

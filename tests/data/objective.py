"""The smallest makers of examples, as a module so that worker processes find them."""

import dataclasses
import typing

import numpy as np

from llama_jax.data.record import Text


@dataclasses.dataclass(frozen=True)
class Causal:
    """`[bos, *x, eos]` shifted by one; all targets count."""

    ends: bool = True
    reads: typing.ClassVar = Text

    def lengths(self, seq_len):
        return {'': seq_len}

    def segments(self, seq_len):
        return 0

    def sizes(self, n, *, seq_len, draw):
        return (n,)

    def example(self, piece, *, tokenizer, seq_len, rng):
        inputs, targets = piece.predicted(tokenizer)
        weights = np.ones(len(inputs), np.float32)
        return {'inputs': inputs, 'targets': targets, 'weights': weights}


class Noisy(Causal):
    """Text of two tokens or more and a mark of one or two positions, by chance; inputs are random:
    a denoiser's shape of data."""

    def __init__(self):
        super().__init__(ends=False)

    def sizes(self, n, *, seq_len, draw):
        return (n + 1 + (draw < 0.5),) if n > 1 else None

    def example(self, piece, *, tokenizer, seq_len, rng):
        (size,) = piece.sizes
        marks = size - len(piece.text)
        return {
            'inputs': rng.integers(0, 99, size).astype(np.int32),
            'targets': np.concatenate([piece.text, np.zeros(marks, np.int32)]),
            'weights': np.repeat([1.0, 0.0], [len(piece.text), marks]),
        }


class Streams(Causal):
    """Two streams: one takes twice what the other does, or the other way round."""

    def lengths(self, seq_len):
        return {'a': seq_len // 2, 'b': seq_len // 2}

    def sizes(self, n, *, seq_len, draw):
        return (n, -(-n // 2)) if draw < 0.5 else (-(-n // 2), n)

    def example(self, piece, *, tokenizer, seq_len, rng):
        return {
            f'{stream}/inputs': np.full(size, stream == 'b', np.int32)
            for stream, size in zip('ab', piece.sizes, strict=True)
        }


class Nothing(Causal):
    """No example, as of documents that are too short for an objective."""

    def sizes(self, n, *, seq_len, draw):
        return None


class Few(Causal):
    """At most three examples of at most four units in a row."""

    def segments(self, seq_len):
        return 3

    def sizes(self, n, *, seq_len, draw):
        return (n,) if n <= 4 else None


class FailsLater(Causal):
    """Fails at the twentieth piece that it sees in this process."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, 'seen', [])

    def example(self, piece, **context):
        self.seen.append(piece.start)
        if len(self.seen) > 20:
            raise RuntimeError('this piece is cursed')
        return super().example(piece, **context)

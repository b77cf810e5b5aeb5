"""The smallest objective: next-token prediction, as a module so that worker processes find it."""

import numpy as np


def causal(tokens, *, tokenizer, seq_len, rng):
    """`[bos, *x, eos]` shifted by one; all targets count."""
    del seq_len, rng
    ids = np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
    weights = np.ones(len(ids) - 1, np.float32)
    return [{'inputs': ids[:-1], 'targets': ids[1:], 'weights': weights}]


def chunks(tokens, *, tokenizer, seq_len, rng):
    """Whole examples of random length, some of them random tokens: a denoiser's shape of data."""
    del tokenizer
    examples = []
    start = 0
    while start < len(tokens):
        length = int(rng.integers(1, seq_len + 1))
        piece = tokens[start : start + length]
        noise = rng.integers(0, 99, len(piece)).astype(np.int32)
        examples.append({'inputs': noise, 'targets': piece, 'weights': np.ones(len(piece))})
        start += length
    return examples


def too_long(tokens, *, tokenizer, seq_len, rng):
    """One example longer than any row."""
    del tokens, tokenizer, rng
    return [{'inputs': np.zeros(seq_len + 1, np.int32)}]


def nothing(tokens, *, tokenizer, seq_len, rng):
    """No example, as of documents that are too short for an objective."""
    del tokens, tokenizer, seq_len, rng
    return []


class FailsLater:
    """Fails at the third document it sees in this process."""

    def __init__(self):
        self.seen = 0

    def __call__(self, tokens, *, tokenizer, seq_len, rng):
        self.seen += 1
        if self.seen > 3:
            raise RuntimeError('document four is cursed')
        return causal(tokens, tokenizer=tokenizer, seq_len=seq_len, rng=rng)

"""Pairs of answers from a seed, packed into batches, and DPO as a loop over them in float64."""

import numpy as np

from llama_jax.data.pieces import Encoded, Piece
from tests.objectives import texts

VOCAB = 64
SEQ_LEN = 64


def records(n, *, seed=0):
    """Encoded pairs: a prompt of 2 to 8 tokens, answers of 1 to 8, among them the id that pads."""
    random = np.random.default_rng(seed)

    def ids(low, high):
        return random.integers(0, VOCAB, random.integers(low, high)).astype(np.int32)

    made = []
    for _ in range(n):
        prompt, chosen, rejected = ids(2, 9), ids(1, 9), ids(1, 9)
        parts = tuple(np.concatenate([prompt, answer]) for answer in (chosen, rejected))
        weights = tuple(
            np.repeat(np.float32([0, 1]), [len(prompt), len(answer)])
            for answer in (chosen, rejected)
        )
        made.append(Encoded(parts, weights, number=float(random.integers(0, 3))))
    return made


def references(n, *, seed=1):
    """Log-probabilities of both answers of each record under some reference [n, 2]."""
    return np.random.default_rng(seed).normal(-20, 5, (n, 2)).astype(np.float32)


def piece(objective, encoded, given=None, *, seq_len=SEQ_LEN):
    lengths = tuple(map(len, encoded.parts))
    room = objective.lengths(seq_len).values()
    sizes = tuple(map(min, objective.whole(lengths, seq_len=seq_len), room))
    return Piece(encoded.parts[0], 0, 1, 0.5, sizes, 0, encoded=encoded, given=given)


def examples(objective, encoded, given=None, *, seq_len=SEQ_LEN):
    given = [None] * len(encoded) if given is None else given
    made = [
        objective.example(
            piece(objective, record, known, seq_len=seq_len),
            tokenizer=None,
            seq_len=seq_len,
            rng=np.random.default_rng(0),
        )
        for record, known in zip(encoded, given, strict=True)
    ]
    return [example for example in made if example is not None]


def batch(objective, encoded, given=None, *, rows, seq_len=SEQ_LEN):
    """All of the records in so many rows, the rest of which is padding."""
    made = examples(objective, encoded, given, seq_len=seq_len)
    packed = texts.packed(made, objective, seq_len=seq_len, rows=rows, pad_id=0)
    assert packed['chosen/segments'].max(1).sum() == len(made)
    return packed


def log_probs(logits_of, encoded):
    """[n, 2] sums over the tokens that bear loss, one answer after another; and their number."""
    sums, counts = [], []
    for record in encoded:
        for ids, weight in zip(record.parts, record.weights, strict=True):
            logit_TV = logits_of(ids[:-1]).astype(np.float64)
            log_p_TV = logit_TV - np.log(np.exp(logit_TV).sum(-1, keepdims=True))
            log_p_T = np.take_along_axis(log_p_TV, ids[1:, None], axis=1)[:, 0]
            sums.append((log_p_T * weight[1:]).sum())
            counts.append(weight[1:].sum())
    return np.array(sums).reshape(-1, 2), np.array(counts).reshape(-1, 2)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)

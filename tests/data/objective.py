"""The smallest objective: next-token prediction, as a module so that worker processes find it."""

import numpy as np


def causal(tokens, *, tokenizer, seq_len, rng):
    """`[bos, *x, eos]` shifted by one; all targets count."""
    del seq_len, rng
    ids = np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
    weights = np.ones(len(ids) - 1, np.float32)
    return [{'inputs': ids[:-1], 'targets': ids[1:], 'weights': weights}]

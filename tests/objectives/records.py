"""Records as rows of a batch, for the tests of objectives that read them."""

import numpy as np

from llama_jax.data import packing
from llama_jax.data.pieces import Piece


def example(objective, record, tokenizer, *, chat=None, seq_len=64, room=None):
    """The example of a record; `room`: positions that it gets of those that it needs."""
    encoded = objective.encoded(record, vocabulary=tokenizer, chat=chat)
    sizes = objective.whole(tuple(map(len, encoded.parts)), seq_len=seq_len)
    if room is not None:
        sizes = tuple(map(min, sizes, room))
    made = objective.example(
        Piece(np.zeros(0, np.int32), 0, 0, 0.5, sizes, 0, encoded),
        tokenizer=tokenizer,
        seq_len=seq_len,
        rng=np.random.default_rng(0),
    )
    if made is not None and room is None:  # exactly the places that it asked for
        assert tuple(n_of(made, stream) for stream in objective.lengths(seq_len)) == sizes
    return made


def n_of(example, stream):
    return len(example[f'{stream}/inputs' if stream else 'inputs'])


def batch_of(objective, rows, tokenizer, *, chat=None, seq_len=64):
    """A batch with the records of each row, one after another."""
    made = [
        [example(objective, record, tokenizer, chat=chat, seq_len=seq_len) for record in row]
        for row in rows
    ]
    lengths = objective.lengths(seq_len)
    first = next(one for row in made for one in row)
    layout = packing.layout_of(first, pad_id=tokenizer.pad_id)
    batch = packing.empty_rows(layout, rows=len(rows), lengths=lengths)
    for i, row in enumerate(made):
        packing.lay(batch, i, row, lengths=lengths)
    return batch

"""Documents of which there are only lengths: what rows are planned from."""

import itertools

import numpy as np

from llama_jax.data.order import BLOCK_ROWS, Blocks, Stream
from llama_jax.data.packing import Packer
from llama_jax.data.plan import Plan


class Lengths:
    """The lengths in tokens of the documents of a source."""

    def __init__(self, tokens):
        self.offsets = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64)
        self.units = int(self.offsets[-1]) + len(tokens)

    def length(self, document):
        return int(self.offsets[document + 1] - self.offsets[document])


def planned(sources, maker, *, seq_len=64, batch=8, seed=0, weights=None, block=None, **settings):
    """A Plan of the rows of such sources."""
    blocks = [Blocks(source.offsets, block or BLOCK_ROWS * seq_len) for source in sources]
    stream = Stream(blocks, weights or [1.0] * len(sources), seed=seed, **settings)
    packer = Packer(maker, seq_len=seq_len, seed=seed)
    return Plan(stream, packer, sources, ends=maker.ends, batch=batch, seq_len=seq_len, seed=seed)


def rows(plan, n=None, cursor=None):
    """[(row, cursor behind it)], `n` of them."""
    return list(itertools.islice(plan.rows(cursor or plan.beginning()), n))


def units(made):
    """Every unit of text in the rows: (source, epoch, document, unit), as often as it is there."""
    return [
        (*placed.block[:3], unit)
        for row, _ in made
        for placed in row
        for unit in range(placed.block.start, placed.block.stop)
    ]


def fill(made, maker, seq_len):
    """Share of the positions of each stream that the rows use."""
    sizes = np.array([np.sum([placed.sizes for placed in row], axis=0) for row, _ in made])
    return sizes.mean(0) / list(maker.lengths(seq_len).values())

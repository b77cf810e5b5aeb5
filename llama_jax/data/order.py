"""The order of documents: which (source, epoch, record) stands at each position of the stream."""

from collections.abc import Sequence

import grain
import numpy as np

Entry = tuple[int, int, int]  # number of the source, epoch of that source, record in it


class _Numbered(grain.experimental.MapWithIndexTransform):
    """Puts the source's number and its epoch beside a record number."""

    def __init__(self, source: int, size: int) -> None:
        self._source, self._size = source, size

    def map_with_index(self, index: int, record: int) -> Entry:
        return self._source, index // self._size, int(record)


def training_order(
    sizes: Sequence[int], weights: Sequence[float], *, seed: int
) -> grain.MapDataset:
    """The endless stream of training documents; `[i]` gives an Entry without any state.

    Each source is shuffled anew in every epoch by `seed`; sources alternate by `weights`.
    """
    sources = []
    for number, size in enumerate(sizes):
        # A seed for each source, so that equal sources do not march in step; hashed, because grain
        # adds the epoch to it, and seed 1 in epoch 1 must not be seed 2 in epoch 0.
        mixed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        shuffled = grain.MapDataset.range(size).shuffle(seed=mixed)
        sources.append(shuffled.repeat(None).map_with_index(_Numbered(number, size)))
    total = sum(weights)
    return grain.MapDataset.mix(sources, [weight / total for weight in weights])


def evaluation_order(sizes: Sequence[int], *, epochs: int) -> list[Entry]:
    """Every document of every source, in stored order, `epochs` times."""
    return [
        (number, epoch, record)
        for epoch in range(epochs)
        for number, size in enumerate(sizes)
        for record in range(size)
    ]

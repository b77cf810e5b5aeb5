"""The order of text: which block of which document stands where in the stream that a run reads.

Documents are cut into blocks, so that a long one is spread over the epoch; the blocks of a source
are shuffled anew in every epoch; and the next block is always of the source that is furthest behind
its share. All of it follows from the lengths of documents and a few integers, on every host alike,
at any place in constant time and memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import grain
import numpy as np

from llama_jax.errors import UserError

BLOCK_ROWS = 4
"""Rows' worth of text in a block: a document is cut where it is longer."""
_GROUP = 1024
_FEW = 1024
"""Numbers of which a whole permutation is quicker: grain's shuffle takes 7 ms for one of two, since
it draws below 2**16 until it hits one, and 40 us for one of these."""
_MOST_BLOCKS = 2**32 - 1  # of grain's index shuffle


class Block(NamedTuple):
    """Units `start` to `stop` of a document, in an epoch of its source.

    A document of n tokens has n + 1 units: its tokens, and its end.
    """

    source: int
    epoch: int
    document: int
    start: int
    stop: int


class Offsets(Protocol):
    """Where documents begin in the tokens of a source: of D documents [D + 1], from 0 on."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice) -> np.ndarray: ...


class Blocks:
    """The documents of a source in blocks of `size` units or fewer, found by number.

    A longer document is cut into blocks as equal as can be. In memory are 8 bytes for every 1,024
    documents; `cache` is a file to keep them in.
    """

    def __init__(self, offsets: Offsets, size: int, *, cache: Path | None = None) -> None:
        self._offsets, self._size = offsets, size
        self.documents = len(offsets) - 1
        kept = None if cache is None else _kept(cache, 1 + -(-self.documents // _GROUP))
        self._before = self._count() if kept is None else kept
        if cache is not None and kept is None:
            _save(cache, self._before)
        if len(self) > _MOST_BLOCKS:
            raise UserError(
                f'{len(self):,} blocks of text in one source are more than can be shuffled '
                f'({_MOST_BLOCKS:,}): divide it into several sources, or raise --train.seq-len'
            )

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, number: int) -> tuple[int, int, int]:
        """(document, start, stop) of a block."""
        group = int(np.searchsorted(self._before, number, side='right')) - 1
        units_D = self._units(group)
        ends_D = np.cumsum(self._blocks(units_D))
        inside = number - int(self._before[group])
        place = int(np.searchsorted(ends_D, inside, side='right'))
        units = int(units_D[place])
        n = -(-units // self._size)
        part = inside - (int(ends_D[place]) - n)
        return group * _GROUP + place, part * units // n, (part + 1) * units // n

    def _units(self, group: int) -> np.ndarray:
        return np.diff(self._offsets[group * _GROUP : (group + 1) * _GROUP + 1]) + 1

    def _blocks(self, units_D: np.ndarray) -> np.ndarray:
        return -(-units_D // self._size)

    def _count(self) -> np.ndarray:
        """Blocks before each group of documents, and in all."""
        groups = -(-self.documents // _GROUP)
        counts = np.fromiter(
            (int(self._blocks(self._units(group)).sum()) for group in range(groups)), np.int64
        )
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


class Shuffled:
    """The numbers below `n`, over and over, each time in another order."""

    def __init__(self, n: int, *, seed: int) -> None:
        self._n, self._seed = n, seed
        self._many = grain.MapDataset.range(n).shuffle(seed=seed)
        self._few = functools.lru_cache(2)(self._permutation)

    def __getitem__(self, index: int) -> int:
        if self._n > _FEW:
            return int(self._many[index])
        epoch, place = divmod(index, self._n)
        return int(self._few(epoch)[place])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._n)


class Place(NamedTuple):
    """How far a source has been read: all that going on needs."""

    blocks: int
    spent: int
    """Units, or documents where shares are of documents: what the shares are kept by."""


class Stream:
    """The blocks of all sources in one stream, endless or for a number of epochs.

    The next block is of the source that has got least for its weight. So at every place each source
    has its share to within one block, whatever the batch or the number of hosts.

    Args:
      weights: shares of the sources, relative to each other.
      share: of what: 'tokens' or 'documents'.
      epochs: None for endless; else every source is read so often and then left out.
      read: how many units of a block are read, where that is not all of it: shares are kept by
        these, and a document of which none is read does not count.
    """

    def __init__(
        self,
        sources: Sequence[Blocks],
        weights: Sequence[float],
        *,
        seed: int,
        share: Literal['tokens', 'documents'] = 'tokens',
        epochs: int | None = None,
        read: Callable[[Block], int] | None = None,
    ) -> None:
        self.sources, self._weights, self._share, self._epochs = sources, weights, share, epochs
        self.read = read or (lambda block: block.stop - block.start)
        # A seed for each source, so that equal sources do not march in step; hashed, because grain
        # adds the epoch to it, and seed 1 in epoch 1 must not be seed 2 in epoch 0.
        seeds = [np.random.SeedSequence([seed, n]).generate_state(1) for n in range(len(sources))]
        self._shuffled = [
            Shuffled(len(blocks), seed=int(mixed[0]))
            for blocks, mixed in zip(sources, seeds, strict=True)
        ]

    def beginning(self) -> tuple[Place, ...]:
        """Where every stream begins."""
        return (Place(0, 0),) * len(self.sources)

    def following(self, places: Sequence[Place]) -> tuple[Block, tuple[Place, ...]] | None:
        """The block that comes next, and where the sources are behind it; None at the end."""
        behind = [
            (place.spent / weight, number)
            for number, (place, weight) in enumerate(zip(places, self._weights, strict=True))
            if self._epochs is None or place.blocks < self._epochs * len(self.sources[number])
        ]
        if not behind:
            return None
        _, number = min(behind)
        blocks, spent = places[number]
        epoch = blocks // len(self.sources[number])
        document, start, stop = self.sources[number][self._shuffled[number][blocks]]
        block = Block(number, epoch, document, start, stop)
        read = self.read(block)
        cost = read if self._share == 'tokens' else int(start == 0 and read > 0)
        moved = (*places[:number], Place(blocks + 1, spent + cost), *places[number + 1 :])
        return block, moved

    def __iter__(self) -> Iterator[Block]:
        places = self.beginning()
        while (found := self.following(places)) is not None:
            block, places = found
            yield block


def uniform(*numbers: int) -> float:
    """A number in [0, 1) that follows from these alone; quicker than a generator."""
    data = struct.pack(f'<{len(numbers)}q', *numbers)
    return (int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little') >> 11) / 2**53


def _kept(path: Path, size: int) -> np.ndarray | None:
    """The array [size] that was saved; None where there is none, or none that is whole."""
    try:
        array = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == (size,) else None


def _save(path: Path, array: np.ndarray) -> None:
    """Keep an array for the next start, where there is room and leave to write."""
    partial = path.with_name(f'{path.name}.{np.random.default_rng().integers(2**31)}.partial')
    try:
        with partial.open('wb') as file:
            np.save(file, array)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # none of them is there to be deleted either
            partial.unlink()

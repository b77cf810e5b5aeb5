"""Which places whole records take, and what becomes of those that are too long for a row."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from llama_jax.data.documents import RecordDocuments
from llama_jax.data.encoded import Records, places, tell
from llama_jax.data.order import Block
from llama_jax.data.pieces import Example, Maker, Sizes, longest
from llama_jax.data.tokens import Texts
from llama_jax.errors import UserError

TooLong = Literal['refuse', 'drop', 'truncate']
MEND_LONG = 'raise --train.seq-len, or set --data.too-long drop or truncate'
_DRAW = 0.5
"""Of pieces, on which the sizes of some objectives depend."""
_NAMED = 3
"""Records that are told one by one."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """Sizes of the examples of records; travels to worker processes."""

    records: tuple[Records, ...]
    maker: Maker
    seq_len: int
    truncate: bool
    left_out: tuple[frozenset[int], ...] = ()
    """Of each source the records of which truncation leaves nothing to learn."""
    positions: Sizes = ()
    """What all records need of each stream, be it more than there is; () before `check`."""
    tokens: tuple[int, ...] = ()
    """Of each source those that are read in an epoch; () before `check`."""

    def __call__(self, block: Block) -> Sizes | None:
        """The places of a record, as many as a row has at most; None where it gives no example."""
        if self.left_out and block.document in self.left_out[block.source]:
            return None
        return self.of(tuple(self.records[block.source].lengths[block.document].tolist()))

    def of(self, lengths: tuple[int, ...]) -> Sizes | None:
        """The places of a record with parts of these lengths."""
        sizes = self.maker.whole(lengths, seq_len=self.seq_len) if any(lengths) else None
        room = self.room
        if sizes is None or all(map(int.__le__, sizes, room)):
            return sizes
        return tuple(map(min, sizes, room)) if self.truncate else None

    def units(self, block: Block) -> int:
        """The tokens of a record that are read: of one that is cut the share that its places are
        of those that it needs; 0 where it gives no example."""
        if self(block) is None:
            return 0
        lengths = tuple(self.records[block.source].lengths[block.document].tolist())
        if not self.truncate:
            return sum(lengths)
        sizes = np.array(self.maker.whole(lengths, seq_len=self.seq_len))
        return int(self.kept(np.array(sum(lengths)), sizes))

    def kept(self, units_D: np.ndarray, sizes_DS: np.ndarray) -> np.ndarray:
        """Of records of so many tokens, which need so many places, the tokens in a row [D]."""
        placed_D = np.minimum(sizes_DS, self.room).sum(-1)
        return -(-units_D * placed_D // sizes_DS.sum(-1))

    @functools.cached_property
    def room(self) -> Sizes:
        """Positions of a row of each stream."""
        return tuple(self.maker.lengths(self.seq_len).values())

    def sizes(self, source: int) -> np.ndarray:
        """What the record of each number needs of each stream, be it more than there is: int64
        [D, S], -1 where it gives no example."""
        lengths_DP = np.asarray(self.records[source].lengths)
        unique, inverse = np.unique(lengths_DP, axis=0, return_inverse=True)
        none = (-1,) * len(self.room)
        needed = [
            (self.maker.whole(tuple(one), seq_len=self.seq_len) if any(one) else None) or none
            for one in unique.tolist()
        ]
        return np.array(needed, np.int64).reshape(len(unique), len(self.room))[inverse.reshape(-1)]


def check(
    whole: Whole,
    documents: Sequence[RecordDocuments],
    example: Callable[[Block, Sizes], Example | None],
    *,
    too_long: TooLong,
) -> Whole:
    """`whole` without the records of which truncation leaves nothing to learn, and with the
    `positions` of all.

    Counts and names the records that need more than a row has, and raises UserError where they are
    refused, or where nothing is left.
    """
    left_out, tokens, positions_S = [], [], np.zeros(len(whole.room), np.int64)
    for source, (records, held) in enumerate(zip(whole.records, documents, strict=True)):
        sizes_DS = whole.sizes(source)
        positions_S += np.maximum(sizes_DS, 0).sum(0)
        share_D = np.max(sizes_DS / np.array(whole.room), axis=1)
        long = np.flatnonzero(share_D > 1)
        long = long[np.argsort(-share_D[long], kind='stable')]  # the longest first
        none = np.flatnonzero((sizes_DS[:, 0] < 0) & (np.diff(records.offsets) > 0))
        if len(none):
            tell(
                f'{len(none):,} of {len(records):,} records give no example for '
                f'{type(whole.maker).__name__} and are left out: {_named(held, none)}'
            )
        if len(long):
            said = _too_long(whole, held, sizes_DS, long)
            if too_long == 'refuse':
                needed = math.ceil(whole.seq_len * share_D[long[0]])
                raise UserError(
                    f'{said}: raise --train.seq-len to {needed}, or set --data.too-long drop or '
                    'truncate'
                )
            how = 'left out' if too_long == 'drop' else 'cut to a row'
            tell(f'{said}; they are {how} (--data.too-long {too_long})')
        left_out.append(_without_loss(whole, source, held, sizes_DS, long, example))
        fits = (sizes_DS[:, 0] >= 0) & ((share_D <= 1) | (too_long == 'truncate'))
        if fits.sum() == len(left_out[-1]):
            raise UserError(
                f'{held.name!r} has no record left to learn from in rows of {whole.seq_len}: raise '
                '--train.seq-len'
            )
        fits[[*left_out[-1]]] = False
        tokens.append(int(whole.kept(np.diff(records.offsets)[fits], sizes_DS[fits]).sum()))
    return dataclasses.replace(
        whole,
        left_out=tuple(left_out),
        positions=tuple(positions_S.tolist()),
        tokens=tuple(tokens),
    )


def _too_long(whole: Whole, held: RecordDocuments, sizes_DS: np.ndarray, long: np.ndarray) -> str:
    """What to say of records that need more than a row has, the longest first."""
    stream = int(np.argmax(sizes_DS[long[0]] / np.array(whole.room)))
    name = [*whole.maker.lengths(whole.seq_len)][stream]
    return (
        f'{len(long):,} of {len(sizes_DS):,} records need more than {whole.room[stream]:,} '
        f'positions{f" of {name}" if name else ""}, the longest {sizes_DS[long[0], stream]:,}: '
        f'{_named(held, long)}'
    )


def _without_loss(
    whole: Whole,
    source: int,
    held: RecordDocuments,
    sizes_DS: np.ndarray,
    long: np.ndarray,
    example: Callable[[Block, Sizes], Example | None],
) -> frozenset[int]:
    """The records that bear no loss once they are cut."""
    if not whole.truncate:
        return frozenset()
    records = whole.records[source]
    lost = []
    for document in sorted(long.tolist()):
        sizes = tuple(np.minimum(sizes_DS[document], whole.room).tolist())
        block = Block(source, 0, document, 0, records.length(document))
        made = example(block, sizes)
        if made is None or not bears_loss(made):
            lost.append(document)
    if lost:
        tell(
            f'{len(lost):,} of the {len(long):,} records that are cut keep nothing to learn from, '
            f'and are left out: {_named(held, lost)}'
        )
    return frozenset(lost)


def bears_loss(example: Example) -> bool:
    """Whether any position has a weight; one without weights does."""
    weights = [x for key, x in example.items() if key.rpartition('/')[2] == 'weights']
    return not weights or any(np.any(x) for x in weights)


def in_order(records: Records, source: int, *, window: int) -> Iterator[tuple[list[Block], bool]]:
    """The records of a source in stored order, `window` at a time; and whether these are the
    last."""
    lengths_D = np.diff(records.offsets)
    numbers = np.flatnonzero(lengths_D)
    for start in range(0, len(numbers), window):
        chosen = numbers[start : start + window].tolist()
        yield (
            [Block(source, 0, n, 0, int(lengths_D[n])) for n in chosen],
            start + window >= len(numbers),
        )


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Texts from their beginning, in pieces as long as a row, which are not cut again."""

    maker: Maker
    seq_len: int

    def __call__(self, block: Block) -> Sizes | None:
        units = block.stop - block.start
        return self.maker.sizes(units, seq_len=self.seq_len, draw=_DRAW)

    def in_order(
        self, texts: Texts, source: int, *, ends: bool, window: int
    ) -> Iterator[tuple[list[Block], bool]]:
        """The pieces of a source in stored order, `window` at a time; and whether these are the
        last."""
        found: list[Block] = []
        room = tuple(self.maker.lengths(self.seq_len).values())
        for document in range(len(texts)):
            start, end = 0, texts.length(document) + ends
            while start < end:
                units = longest(
                    self.maker, end - start, room=room, seq_len=self.seq_len, draw=_DRAW
                )
                if not units:
                    break
                found.append(Block(source, 0, document, start, start + units))
                start += units
            if len(found) >= window:
                yield found, False
                found = []
        yield found, True


def _named(held: RecordDocuments, numbers: Sequence[int] | np.ndarray) -> str:
    named = places(held, map(int, numbers[:_NAMED]))
    return f'{named}, ...' if len(numbers) > _NAMED else named

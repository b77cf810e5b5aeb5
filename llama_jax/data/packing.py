"""Packing pieces of documents into rows of fixed length, with segments and positions.

A row is planned from lengths alone: the piece that waits longest opens it, then always the largest
that fits whole (best fit, as in Ding et al. 2024, "Fewer Truncations Improve Language Modeling"),
and where none does, one is cut where the row ends. Where an objective fills two streams in another
proportion than the row has, a partner is looked for that evens it out. Records are never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.data.order import Block, uniform
from llama_jax.data.pieces import FEWEST, Example, Maker, Sizes, longest

Layout = dict[str, tuple[np.dtype, int, tuple[int, ...]]]
"""Key to dtype, padding, and the dimensions behind the positions."""
Lengths = Mapping[str, int]  # stream to the length of a row; '' is the stream without a name

_SPARE = 1 / 64
"""Share of a row that may stay empty before a piece is cut to fill it."""
_CANDIDATES = 64
"""Pieces that are tried for a place in two streams."""
_GAIN = 0.01
"""Share of a row that evening out has to gain."""


class Placed(NamedTuple):
    """A piece of a block in a row."""

    block: Block
    draw: float
    sizes: Sizes


Row = list[Placed]


def layout_of(example: Example, *, pad_id: int) -> Layout:
    """Integers become int32 and the rest float32; inputs and targets are padded with `pad_id`."""
    layout = {}
    for key, values in example.items():
        dtype = np.dtype(np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32)
        pad = pad_id if key.endswith(('inputs', 'targets')) else 0
        layout[key] = dtype, pad, values.shape[1:]
    return layout


def empty_rows(layout: Layout, *, rows: int, lengths: Lengths) -> dict[str, np.ndarray]:
    """Rows [rows, T] of nothing but padding: weight 0, segment 0."""
    arrays = {
        key: np.full((rows, lengths[stream_of(key)], *more), pad, dtype)
        for key, (dtype, pad, more) in layout.items()
    }
    for stream, length in lengths.items():
        for name in ('segments', 'positions'):
            arrays[_key(stream, name)] = np.zeros((rows, length), np.int32)
    return arrays


def lay(
    rows: dict[str, np.ndarray], index: int, examples: Sequence[Example], *, lengths: Lengths
) -> None:
    """Write the examples one after another to `rows[key][index]` [T], all padding so far.

    Raises ValueError for examples that do not fit, or that are not alike.
    """
    filled = dict.fromkeys(lengths, 0)
    wanted = {key for key in rows if not key.endswith(('segments', 'positions'))}
    for segment, example in enumerate(examples, start=1):
        if example.keys() != wanted:
            raise ValueError(f'examples with keys {[*example]} and {sorted(wanted)} in one batch')
        sizes: dict[str, int] = {}
        for key, values in example.items():
            stream = stream_of(key)
            if sizes.setdefault(stream, len(values)) != len(values):
                raise ValueError(
                    'an example with arrays of different lengths: '
                    f'{ {key: len(values) for key, values in example.items()} }'
                )
            rows[key][index, filled[stream] : filled[stream] + len(values)] = values
        for stream, n in sizes.items():
            here = slice(filled[stream], filled[stream] + n)
            rows[_key(stream, 'segments')][index, here] = segment
            rows[_key(stream, 'positions')][index, here] = np.arange(n)
            filled[stream] += n


class Packer:
    """Plans rows of the pieces of some blocks.

    Args:
      maker: tells the sizes of examples.
      seq_len: positions of a row, over all streams.
      seed: of the draws on which sizes depend.
      whole: of records, which are never cut, in place of the maker: the sizes of the example of a
        block; None where it gives none.
    """

    def __init__(
        self,
        maker: Maker,
        *,
        seq_len: int,
        seed: int,
        whole: Callable[[Block], Sizes | None] | None = None,
    ) -> None:
        self._maker, self._seq_len, self._seed, self.whole = maker, seq_len, seed, whole
        self.lengths = maker.lengths(seq_len)
        self._room = tuple(self.lengths.values())
        self._most = maker.segments(seq_len) or None
        if whole is not None:
            return
        possible = (
            all(maker.sizes(n, seq_len=seq_len, draw=draw) for draw in (0.0, 0.5, 0.99))
            for n in range(1, FEWEST)
        )
        self.fewest = next((n for n, fits in enumerate(possible, start=1) if fits), FEWEST)

    def rows(self, blocks: Sequence[Block], *, flush: bool) -> tuple[list[Row], list[Block]]:
        """Rows of all blocks, earlier blocks first, and what is left for the next rows: less than
        fills one; nothing when `flush`, which lets the last row be short."""
        pool = _Pool(self, blocks)
        rows: list[Row] = []
        while pool.any():
            row, room = self._fill(pool)
            if not flush and not pool.any() and self._short(room, row):
                return rows, _joined([placed.block for placed in row])
            rows.append(row)
        return rows, []

    def room_for(self, units: int, draw: float, room: Sizes | None = None) -> int:
        """Most of `units` that fit in `room` (default: an empty row) and leave nothing or what can
        be an example; 0 where none do."""
        room = room or self._room
        fit = longest(self._maker, units, room=room, seq_len=self._seq_len, draw=draw)
        if not 0 < units - fit < self.fewest:
            return fit
        fit = units - self.fewest
        return max(fit, 0) if fit >= self.fewest else 0

    def sizes(self, units: int, draw: float) -> Sizes:
        """Sizes of an example which is known to be possible."""
        sizes = self._maker.sizes(units, seq_len=self._seq_len, draw=draw)
        assert sizes is not None
        return sizes

    def _fill(self, pool: _Pool) -> tuple[Row, np.ndarray]:
        """The next row, and the room that is left in it."""
        whole = np.array(self._room)
        spare = np.ceil(whole * _SPARE) - 1
        first = pool.first()
        row = [pool.take(first, pool.even(first, whole))]
        room = whole - row[0].sizes
        while pool.any() and (self._most is None or len(row) < self._most):
            found = pool.best(room)
            if found is None and self.whole is None and not np.any(room <= spare):
                found = pool.cut(room)
            if found is None:
                break
            row.append(pool.take(*found))
            room = room - row[-1].sizes
        return row, room

    def _short(self, room: np.ndarray, row: Row) -> bool:
        """Whether a row has room for more."""
        if self._most is not None and len(row) == self._most:
            return False
        return bool(np.all(room > np.array(self._room) * _SPARE))


class _Pool:
    """What is left of the blocks. The head of each is as long as an empty row takes."""

    def __init__(self, packer: Packer, blocks: Sequence[Block]) -> None:
        self._packer = packer
        self._blocks = list(blocks)
        n, streams = len(blocks), len(packer.lengths)
        self._head_N = np.zeros(n, np.int64)
        self._draw_N = np.zeros(n)
        self._size_NS = np.zeros((n, streams), np.int64)
        self._left_N = np.ones(n, bool)
        self._whole = np.array([*packer.lengths.values()])
        self._next = 0
        for i in range(n):
            self._load(i)

    def any(self) -> bool:
        return bool(self._left_N.any())

    def first(self) -> int:
        """The block that waits longest."""
        while not self._left_N[self._next]:
            self._next += 1
        return self._next

    def take(self, i: int, units: int) -> Placed:
        """The first units of block i."""
        block, draw = self._blocks[i], float(self._draw_N[i])
        piece = block._replace(stop=block.start + units)
        self._blocks[i] = block._replace(start=piece.stop)
        if units == self._head_N[i]:
            sizes: Sizes = tuple(self._size_NS[i].tolist())
        else:
            sizes = self._packer.sizes(units, draw)
        self._load(i)
        return Placed(piece, draw, sizes)

    def best(self, room: np.ndarray) -> tuple[int, int] | None:
        """(block, units) of the head that fits best; None where none fits."""
        fits_N = self._left_N & np.all(self._size_NS <= room, axis=1)
        if not fits_N.any():
            return None
        i = int(np.argmin(np.where(fits_N, self._misfit(room - self._size_NS), np.inf)))
        return i, int(self._head_N[i])

    def cut(self, room: np.ndarray) -> tuple[int, int] | None:
        """(block, units) of a part of a head that fills the room; None where none does."""
        found = []
        if len(self._whole) == 1:  # the longest is hurt least
            candidates = [int(np.argmax(np.where(self._left_N, self._size_NS[:, 0], -1)))]
        else:
            candidates = np.flatnonzero(self._left_N)[:_CANDIDATES].tolist()
        for i in candidates:
            draw = float(self._draw_N[i])
            if units := self._packer.room_for(int(self._head_N[i]), draw, tuple(room.tolist())):
                left = room - self._packer.sizes(units, draw)
                found.append((float(self._misfit(left)), i, units))
        if not found:
            return None
        _, i, units = min(found)
        return i, units

    def even(self, i: int, room: np.ndarray) -> int:
        """Units of the head of block i with which two streams can be filled evenly.

        All of it, unless a part of it and a partner of another proportion fill the row better: two
        linear equations for the units of both.
        """
        head, size = int(self._head_N[i]), self._size_NS[i]
        left = (room - size) / room
        if self._packer.whole is not None:
            return head
        if len(room) != 2 or np.ptp(left) < _SPARE or left.min() > 0.5:
            return head
        a, c = (size / head).tolist()  # positions of each stream for a unit of this block
        best, units = float(size.sum() / room.sum()), head
        others = np.flatnonzero(self._left_N)
        for j in others[others != i][:_CANDIDATES].tolist():
            b, d = (self._size_NS[j] / self._head_N[j]).tolist()
            determinant = a * d - b * c
            if abs(determinant) < 1e-6:
                continue
            mine = (room[0] * d - room[1] * b) / determinant
            its = min((room[1] * a - room[0] * c) / determinant, self._head_N[j])
            filled = (mine * (a + c) + its * (b + d)) / room.sum()
            if 2 <= mine <= head and its >= 2 and filled > best + _GAIN:
                best, units = filled, int(mine)
            if best > 1 - _SPARE:
                break
        left = self._blocks[i].stop - self._blocks[i].start
        if 0 < left - units < self._packer.fewest:
            units = left - self._packer.fewest
        fits = units > 0 and self._packer.room_for(units, float(self._draw_N[i])) == units
        return units if fits else head

    def _misfit(self, left: np.ndarray) -> np.ndarray:
        """What is left of a row, and how unevenly: less is better."""
        share = left / self._whole
        return share.max(-1) + np.ptp(share, axis=-1)

    def _load(self, i: int) -> None:
        """The head of what is left of block i; the block is gone where no example can be made."""
        block = self._blocks[i]
        units = block.stop - block.start
        if units <= 0:
            self._left_N[i] = False
            return
        draw = uniform(self._packer._seed, *block[:4])
        if self._packer.whole is not None:
            sizes = self._packer.whole(block)
            self._left_N[i] = sizes is not None
            if sizes is not None:
                self._draw_N[i], self._head_N[i], self._size_NS[i] = draw, units, sizes
            return
        head = self._packer.room_for(units, draw)
        self._left_N[i] = head > 0
        if head:
            self._draw_N[i], self._head_N[i] = draw, head
            self._size_NS[i] = self._packer.sizes(head, draw)


def _joined(blocks: list[Block]) -> list[Block]:
    """Blocks in which neighbouring parts of a document are one again."""
    joined: list[Block] = []
    for block in sorted(blocks):
        if joined and joined[-1][:3] == block[:3] and joined[-1].stop == block.start:
            joined[-1] = joined[-1]._replace(stop=block.stop)
        else:
            joined.append(block)
    return joined


def stream_of(key: str) -> str:
    """The stream of an array: what stands before the last '/'."""
    return key.rpartition('/')[0]


def _key(stream: str, name: str) -> str:
    return f'{stream}/{name}' if stream else name

"""The rows of a run, planned window by window, and the cursor to go on from any of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from llama_jax.data.order import Block, Place, Stream
from llama_jax.data.packing import Packer, Row
from llama_jax.errors import UserError

_WINDOW_ROWS = 1024
_WINDOW_BATCHES = 8
_WINDOW_BLOCKS = 2048
"""A window has text for so many rows, and for so many batches, but no more blocks than these."""


@dataclasses.dataclass(frozen=True)
class Cursor:
    """A place in the rows of a run; of constant size, the same on every host."""

    places: tuple[Place, ...]
    """Where the sources are as the window begins."""
    carried: tuple[Block, ...] = ()
    """Text that did not fill a row of the window before."""
    window: int = 0
    row: int = 0
    """Rows of the window that are used."""
    read: tuple[tuple[int, int], ...] = ()
    """(units, documents) that the rows took of each source; a document counts by its beginning."""

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.astuple(self), separators=(',', ':'))

    @classmethod
    def loads(cls, text: str) -> Cursor:
        """What `dumps` wrote."""
        places, carried, window, row, read = json.loads(text)
        return cls(
            tuple(Place(*place) for place in places),
            tuple(Block(*block) for block in carried),
            window,
            row,
            tuple((units, documents) for units, documents in read),
        )


class Lengths(Protocol):
    """Tokens of each document of a source."""

    def length(self, document: int) -> int: ...


class Plan:
    """The rows of a run, in order.

    The stream of blocks is taken in windows. A window is packed with all of its blocks in view, its
    rows are shuffled, and what fills no row opens the next. So a place is a window and a row in it:
    to go on there, one window is planned again.
    """

    def __init__(
        self,
        stream: Stream,
        packer: Packer,
        lengths: Sequence[Lengths],
        *,
        ends: bool,
        batch: int,
        seq_len: int,
        seed: int,
    ) -> None:
        self._stream, self._packer, self._lengths, self._ends = stream, packer, lengths, ends
        self._seed, self.seq_len = seed, seq_len
        self._batch = batch * seq_len
        self._target = max(_WINDOW_ROWS * seq_len, _WINDOW_BATCHES * self._batch)

    def beginning(self) -> Cursor:
        """The cursor before the first row."""
        return Cursor(self._stream.beginning(), read=((0, 0),) * len(self._stream.sources))

    def rows(self, cursor: Cursor) -> Iterator[tuple[Row, Cursor]]:
        """Every row from the cursor on, with the cursor behind it.

        Raises UserError when all of the text gives no example.
        """
        fruitless = 0
        while True:
            rows, behind, taken = self._window(cursor)
            for row in rows[cursor.row :]:
                cursor = dataclasses.replace(
                    cursor, row=cursor.row + 1, read=self._with(cursor.read, row)
                )
                yield row, cursor
            fruitless = 0 if rows else fruitless + taken
            if fruitless > sum(map(len, self._stream.sources)) and not behind.carried:
                raise UserError(
                    'no document gives an example for this objective: they are too short or empty; '
                    'use other data'
                )
            if not taken:
                return
            cursor = dataclasses.replace(behind, read=cursor.read)

    def _window(self, cursor: Cursor) -> tuple[list[Row], Cursor, int]:
        """The rows of the window that the cursor is in, the cursor behind it, and its blocks."""
        blocks, places = self._blocks(cursor.places)
        rows, carried = self._packer.rows(
            [*cursor.carried, *filter(None, map(self._clipped, blocks))], flush=not blocks
        )
        shuffled = np.random.default_rng([self._seed, cursor.window]).permutation(len(rows))
        rows = [rows[i] for i in shuffled]
        if len(self._stream.sources) == 1:  # what is left of an epoch comes before the next one
            rows.sort(key=lambda row: min(placed.block.epoch for placed in row))
        return rows, Cursor(places, tuple(carried), cursor.window + 1), len(blocks)

    def _blocks(self, places: tuple[Place, ...]) -> tuple[list[Block], tuple[Place, ...]]:
        """Blocks for a window. Of one source, it ends with an epoch, where a row can be had so; of
        several, none is read more than once in it, where a batch can be had so."""
        sizes, begin = [len(source) for source in self._stream.sources], places
        blocks: list[Block] = []
        units = 0
        while units < self._target and len(blocks) < _WINDOW_BLOCKS:
            found = self._stream.following(places)
            if found is None:
                break
            block, behind = found
            next_epoch = bool(blocks) and block.epoch != blocks[-1].epoch
            enough = units >= self.seq_len or begin[0].blocks % sizes[0] > 0
            if len(sizes) == 1 and next_epoch and enough:
                break
            read = places[block.source].blocks - begin[block.source].blocks
            if units > self._batch and read >= sizes[block.source]:
                break
            places = behind
            blocks.append(block)
            units += block.stop - block.start
        return blocks, places

    def _with(self, read: tuple[tuple[int, int], ...], row: Row) -> tuple[tuple[int, int], ...]:
        counts = [list(pair) for pair in read]
        for placed in row:
            counts[placed.block.source][0] += self._stream.read(placed.block)
            counts[placed.block.source][1] += placed.block.start == 0
        return tuple((units, documents) for units, documents in counts)

    def _clipped(self, block: Block) -> Block | None:
        """The block without its document's end, where the objective does not learn it."""
        if self._ends:
            return block
        stop = min(block.stop, self._lengths[block.source].length(block.document))
        return block._replace(stop=stop) if stop > block.start else None

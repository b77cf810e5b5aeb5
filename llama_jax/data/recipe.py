"""All that makes rows of a run from documents."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol

import numpy as np

from llama_jax.data import order, packing, tokens
from llama_jax.data.encoded import Records
from llama_jax.data.pieces import Example, Maker, Piece
from llama_jax.data.plan import Plan
from llama_jax.data.whole import Whole
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer

Batch = dict[str, Any]
_WHOLE = 2**62
"""Units of a block that no document has."""


class ByDocument(Protocol):
    """Arrays by the numbers of documents; travels to worker processes."""

    def __getitem__(self, document: int, /) -> np.ndarray: ...


Given = tuple[ByDocument, ...] | None
"""Of each source what was computed of its documents before; None where nothing was."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that makes rows from documents; travels to worker processes."""

    texts: tuple[tokens.Texts, ...]
    weights: tuple[float, ...]
    share: Literal['tokens', 'documents']
    tokenizer: Tokenizer
    maker: Maker
    batch: int
    seq_len: int
    seed: int
    """Of the order."""
    masks: int
    """Of what is drawn for each example."""
    epochs: int | None
    layout: packing.Layout = dataclasses.field(default_factory=dict)
    whole: Whole | None = None
    """Of records, which are never cut."""
    given: Given = None

    def stream(self) -> order.Stream:
        """The blocks of all sources, in the order of this run."""
        return order.Stream(
            [blocks_of(text, None if self.whole else self.seq_len) for text in self.texts],
            self.weights,
            seed=self.seed,
            share=self.share,
            epochs=self.epochs,
            read=self.whole.units if self.whole else None,
        )

    @property
    def ends(self) -> bool:
        """Whether the end of a document is a unit to be learnt."""
        return self.whole is None and self.maker.ends

    @property
    def units(self) -> list[int]:
        """Those that are read in an epoch of each source."""
        if self.whole is not None:
            return list(self.whole.tokens)
        return [texts.tokens + self.ends * len(texts) for texts in self.texts]

    def packer(self) -> packing.Packer:
        return packing.Packer(self.maker, seq_len=self.seq_len, seed=self.masks, whole=self.whole)

    def plan(self) -> Plan:
        return Plan(
            self.stream(),
            self.packer(),
            self.texts,
            ends=self.ends,
            batch=self.batch,
            seq_len=self.seq_len,
            seed=self.seed,
        )

    def examples(self, row: packing.Row) -> list[Example]:
        """The examples of a row. Randomness is keyed by seed (masks), epoch, source, document and
        place."""
        return [example for placed in row if (example := self.example(placed)) is not None]

    def example(self, placed: packing.Placed) -> Example | None:
        """The example of one piece, where the text gives one."""
        block, draw, sizes = placed
        texts = self.texts[block.source]
        if not block.start:  # once an epoch
            texts.check(block.document)
        piece = Piece(
            texts[block.document],
            block.start,
            block.stop,
            draw,
            sizes,
            texts.identity(block.document),
            origin=(block.epoch, block.source, block.document),
        )
        if isinstance(texts, Records):
            piece = piece._replace(encoded=texts.encoded(block.document))
        if self.given is not None:
            piece = piece._replace(given=self.given[block.source][block.document])
        key = [self.masks, block.epoch, block.source, block.document, block.start]
        return self.maker.example(
            piece,
            tokenizer=self.tokenizer,
            seq_len=self.seq_len,
            rng=np.random.default_rng(key),
        )

    def empty(self, rows: int) -> Batch:
        """Padding rows."""
        lengths = self.maker.lengths(self.seq_len)
        return packing.empty_rows(self.layout, rows=rows, lengths=lengths)


def blocks_of(texts: tokens.Texts, seq_len: int | None) -> order.Blocks:
    """The documents of a source in blocks, for rows of `seq_len`: the same for every objective.
    None: each is one block."""
    size = _WHOLE if seq_len is None else order.BLOCK_ROWS * seq_len
    return order.Blocks(texts.offsets, size, cache=texts.directory / f'blocks-{size}.npy')


def layout(recipe: Recipe, plan: Plan) -> packing.Layout:
    for row, _ in plan.rows(plan.beginning()):
        for example in recipe.examples(row):
            return packing.layout_of(example, pad_id=recipe.tokenizer.pad_id)
    raise UserError('no document gives an example for this objective: use other data')

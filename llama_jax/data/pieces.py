"""Pieces of documents: what packing asks of an objective, and what it gives to it.

Packing knows how long documents are, and cuts them where rows end; an objective knows how many
positions the example of a piece takes, and makes it. So a batch can be planned from lengths alone,
by every host alike, and only the text of one's own rows is read.

Streams. An objective that feeds two sequences to the model (an encoder and a decoder, two views)
names the arrays of the second 'STREAM/key'. Arrays of one stream have one length; each stream has a
row of its own, and segment k of one belongs to segment k of the others.
"""

from __future__ import annotations

import bisect
import zlib
from typing import Any, NamedTuple, Protocol

import numpy as np

from llama_jax.data.record import Record
from llama_jax.text.chat import ChatFormat
from llama_jax.text.vocabulary import Vocabulary

Sizes = tuple[int, ...]
"""Positions in the row of each stream."""
Example = dict[str, np.ndarray]
"""Arrays such as inputs, targets, weights; 'STREAM/inputs' those of another stream."""
FEWEST = 8
"""Units of text of which every objective can make an example, where rows are long enough."""


class Encoded(NamedTuple):
    """A record as token ids. It is made once, and kept on disk."""

    parts: tuple[np.ndarray, ...]
    """Token ids int32 [n] of each part, such as (source, target) or (chosen, rejected)."""
    weights: tuple[np.ndarray, ...]
    """Loss weight float32 [n] of each token of each part."""
    number: float = 0.0
    """What a record has besides its text: the index of its label, a margin."""


class Piece(NamedTuple):
    """Units `start` to `stop` of a document.

    A document of n tokens has n + 1 units: its tokens, and its end.
    """

    tokens: np.ndarray
    """All of the document's [n], of any type of integer."""
    start: int
    stop: int
    draw: float
    """What `Maker.sizes` was asked with."""
    sizes: Sizes
    """Positions that the example may take in each stream."""
    identity: int
    """A number in [0, 2^31) that equal documents share, and hardly any others."""
    encoded: Encoded | None = None
    """Of a record that is more than text; its piece is always the whole record."""
    given: np.ndarray | None = None
    """What was computed of the whole document before training, float32, such as log-probabilities
    of a record under a reference model [C], or what a teacher says of each unit [n, C]."""
    origin: tuple[int, int, int] = (0, 0, 0)
    """Epoch, source and document: who works on an example after it was made finds its record so."""

    @property
    def text(self) -> np.ndarray:
        """The tokens of the piece, int32."""
        return self.tokens[self.start : self.stop].astype(np.int32)

    def predicted(self, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets [stop - start] of next-token prediction: the targets are the units of
        the piece, the inputs what stands before each; a begin token opens the document."""
        before = self.tokens[self.start - 1 : self.start] if self.start else [tokenizer.bos_id]
        after = [tokenizer.eos_id] if self.stop > len(self.tokens) else []
        ids = np.concatenate([before, self.text, after]).astype(np.int32)
        return ids[:-1], ids[1:]


class Maker(Protocol):
    """What makes examples of pieces: the part of an objective that works on the host."""

    @property
    def reads(self) -> type[Record]:
        """The type of records that it makes examples of. All but `Text` are made token ids by
        `encoded`, are never cut, and take the places that `whole` says in place of `sizes`."""
        ...

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        """A record of the type `reads` as token ids. It depends on these arguments and the settings
        in `encoding` alone: not on the length of rows, nor on chance. Raises BadRecordError."""
        ...

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The settings that `encoded` depends on: they are part of the cache's name."""
        ...

    def whole(self, lengths: tuple[int, ...], *, seq_len: int) -> Sizes | None:
        """Positions that the example of a record takes in each stream, whose parts have these
        `lengths`: all that it needs, be it more than a row has; None where there is no example at
        all. Packing refuses or leaves out what is too long, or where that is asked for
        (`data.too_long` 'truncate') gives it as much as a row has: `piece.sizes` are then smaller
        than these, and `example` cuts to them."""
        ...

    @property
    def ends(self) -> bool:
        """Whether the end of a document is a unit to be learnt, as in causal language modelling.
        False: pieces hold tokens only."""
        ...

    def lengths(self, seq_len: int) -> dict[str, int]:
        """Length of a row of each stream; '' is the stream without a name. Their sum is the
        positions that the backbone processes per row, `seq_len`, so that objectives of one batch
        size process equally many."""
        ...

    def segments(self, seq_len: int) -> int:
        """Most examples that a row may hold. 0: as many as fit."""
        ...

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        """Positions that the example of a piece of `n` units takes in each stream, at most; in the
        order of `lengths`.

        None where no example can be made: of too few units, or too many. As n grows no size ever
        falls, and after a None of too many units all are None, so that the longest piece that fits
        can be searched for. `draw`, in [0, 1), is the chance on which sizes may depend: a denoiser,
        the lengths of crops. It is asked often, and without the text: it has to be quick.
        """
        ...

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The example made of a piece: arrays [n] by name, of one length n in a stream, which is
        that of `piece.sizes` or less. None where the text gives none after all.

        `tokenizer` gives the ids of control tokens; all chance comes from `rng` and `piece.draw`.
        """
        ...


def identity_of(tokens: np.ndarray, more: bytes = b'') -> int:
    """`Piece.identity` of a document: a checksum of its token ids, and of what else it has."""
    return zlib.crc32(more, zlib.crc32(tokens.astype('<i4').tobytes())) & 0x7FFFFFFF


def longest(maker: Maker, n: int, *, room: Sizes, seq_len: int, draw: float) -> int:
    """Most of `n` units whose example fits in `room`; 0 where none does."""

    def fits(units: int) -> bool:
        sizes = maker.sizes(units, seq_len=seq_len, draw=draw)
        return sizes is not None and all(map(int.__le__, sizes, room))

    if fits(n):
        return n
    # Too few units give none either: the search begins at the fewest that do.
    fewest = next((units for units in range(1, min(n, FEWEST + 1)) if fits(units)), 0)
    if not fewest:
        return 0
    return bisect.bisect_left(range(n), True, lo=fewest + 1, key=lambda units: not fits(units)) - 1


def examples(
    maker: Maker, tokens: np.ndarray, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
) -> list[Example]:
    """Examples of one document by itself: pieces as long as a row takes, and the rest."""
    room = tuple(maker.lengths(seq_len).values())
    made: list[Example] = []
    identity = identity_of(tokens)
    start, end = 0, len(tokens) + maker.ends
    while start < end:
        draw = rng.random()
        n = longest(maker, end - start, room=room, seq_len=seq_len, draw=draw)
        sizes = maker.sizes(n, seq_len=seq_len, draw=draw) if n else None
        if sizes is None:
            break
        piece = Piece(tokens, start, start + n, draw, sizes, identity)
        example = maker.example(piece, tokenizer=tokenizer, seq_len=seq_len, rng=rng)
        made += [] if example is None else [example]
        start += n
    return made

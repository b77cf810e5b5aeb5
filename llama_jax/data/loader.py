"""Global batches of packed rows, read ahead of the training step.

Every host plans the same rows of the whole run (plan.py), from the lengths of documents alone, and
makes the examples of its own rows. So a batch depends neither on the number of hosts, nor of
workers, nor on how far they read ahead, and the cursor to resume from travels with the batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Literal

import grain
import numpy as np
from absl import flags

from llama_jax.data import forecast, order, packing, sources, tokens, whole
from llama_jax.data.config import DataConfig, labels
from llama_jax.data.documents import Documents, RecordDocuments
from llama_jax.data.encoded import Records, encoded, tell
from llama_jax.data.pieces import Example, Maker, Sizes
from llama_jax.data.plan import Cursor
from llama_jax.data.recipe import Batch, Given, Recipe, layout
from llama_jax.data.record import Text
from llama_jax.errors import UserError
from llama_jax.text.chat import ChatFormat
from llama_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_VERSION = 3
"""Of the order of rows: a cursor of another one leads elsewhere."""
_WINDOW = 2048
"""Records that are packed together when they are read in order."""


class Loader:
    """This host's share of the global batches, as dicts of numpy arrays.

    `rows` are those of the global batch to make here, where other hosts make the rest; default:
    all. A batch holds [B_local, T] arrays: every key that examples of `maker` have (integers as
    int32, the rest as float32; `inputs` and `targets` padded with pad_id, the rest with 0),
    `segments` (1, 2, ... for each piece of a document in the row, 0 for padding) and `positions`
    (from 0 in a segment); arrays of another stream are named 'STREAM/inputs', 'STREAM/segments'.
    `cursor`, a text of constant size and the same on all hosts, is the place behind this batch:
    give it back to go on from there, with any number of hosts and workers.

    `chat` is how the objective writes chats, where it reads any. `given` is for each source what
    was computed of its documents before, float32, by their numbers: `Piece.given`.

    `of`: a loader of the same settings, whose corpus is read, as it was found then.

    `epochs=None` is training: endless. `epochs=n` is evaluation: every document n times, the last
    batch is filled up with padding rows. Both are shuffled by `seed`; `masks` is the seed of what
    an objective draws for each example, where that is another.

    Attributes:
        texts: the tokenised sources.
        documents: the sources as they are stored.
        digest: hash of everything that decides the batches apart from the objective's own settings;
            a cursor makes sense for an equal digest only.
        labels: of the sources, as figures name them.
        seconds_waited: time that `next` spent waiting for a batch, since the start.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Literal['train', 'validation'],
        tokenizer: Tokenizer,
        maker: Maker,
        batch: int,
        seq_len: int,
        seed: int,
        rows: Sequence[int] | None = None,
        cursor: str | None = None,
        epochs: int | None = None,
        chat: ChatFormat | None = None,
        given: Given = None,
        masks: int | None = None,
        of: Loader | None = None,
    ) -> None:
        masks = seed if masks is None else masks
        if batch < 1 or seq_len < 1:
            raise UserError(f'a batch of {batch} rows of {seq_len} tokens: set both to 1 or more')
        if config.workers < 0 or config.prefetch < 0:
            raise UserError('data.workers and data.prefetch must be 0 or more')
        corpus = of.corpus if of else sources.open_sources(config, split, maker.reads)
        self.corpus: sources.Corpus = corpus
        self.texts: tuple[tokens.Texts, ...]
        self._recipe: Recipe
        if of is not None:
            self.texts = of.texts
        elif maker.reads is Text:
            self.texts = tokens.tokenised(corpus, tokenizer)
        else:
            self.texts = encoded(corpus, tokenizer, maker, chat, bad=config.bad_records)
        self.documents = corpus.sources
        self.labels = labels(config.of(split))
        # Read to the end, sources get the shares that they have.
        weights = corpus.weights if epochs is None else tuple(max(t.tokens, 1) for t in self.texts)
        recipe = Recipe(
            *(self.texts, weights, config.share, tokenizer, maker),
            *(batch, seq_len, seed, masks, epochs),
        )
        if maker.reads is not Text:  # `of` has measured them
            recipe = of._recipe if of else _fitted(recipe, self.documents, config.too_long)
        recipe = dataclasses.replace(recipe, given=given)
        self._plan = recipe.plan()
        # One example tells which arrays there are, so that a host without rows knows as well.
        self._recipe = dataclasses.replace(recipe, layout=layout(recipe, self._plan))
        facts = (
            *(_VERSION, [text.digest for text in self.texts], weights, config.share),
            *(batch, seq_len, seed, epochs),
            *(() if masks == seed else (masks,)),
            *(() if maker.reads is Text else (config.too_long,)),
        )
        if recipe.whole and len(self.texts) > 1:
            facts = (*facts, 'tokens read')  # shares were once of what is left out as well
        self.digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        self.seconds_waited = 0.0
        self._mine = mine = list(range(batch)) if rows is None else list(rows)
        self._rows = len(mine)
        self._workers = min(config.workers, self._rows) if epochs is None else 0
        begin = self._plan.beginning() if cursor is None else _read(cursor, len(self.texts))
        dataset: grain.IterDataset = _Rows(self._recipe, mine, begin)
        if epochs is None:
            self._warn_of_repetition()
        if self._workers:
            _allow_grain_outside_of_absl()
            options = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=max(config.prefetch, 1)
            )
            dataset = dataset.mp_prefetch(options, worker_init_fn=_ignore_interrupts)
        else:
            dataset = grain.experimental.ThreadPrefetchIterDataset(
                dataset, prefetch_buffer_size=config.prefetch
            )
        self._iterator: Iterator[Batch] | None = iter(dataset)
        # Also when nobody closes it: grain must end its processes before Python's modules go.
        self._finalizer = weakref.finalize(self, self._iterator.close)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise ValueError('the loader is closed')
        start = time.perf_counter()
        try:
            if not self._workers:
                return next(self._iterator)
            parts = [next(self._iterator) for _ in range(self._workers)]
            return self._merge(parts)
        finally:
            self.seconds_waited += time.perf_counter() - start

    def empty_batch(self) -> Batch:
        """A batch of padding rows only, of the shapes of every batch, at the beginning."""
        return self._recipe.empty(self._rows) | {'cursor': self._plan.beginning().dumps()}

    def read(self, cursor: str) -> dict[str, float]:
        """What was read up to the cursor: 'epochs' and 'documents'; of several sources for each, as
        'epochs/LABEL', and 'share/LABEL' of all tokens."""
        return self._told(Cursor.loads(cursor).read)

    def origins(self) -> Iterator[list[order.Block]]:
        """Where the segments of each row of the global batches come from, from the beginning."""
        for row, _ in self._plan.rows(self._plan.beginning()):
            yield [placed.block for placed in row if self._recipe.example(placed) is not None]

    def in_order(self, source: int) -> Iterator[tuple[Batch, list[list[order.Block]]]]:
        """Batches of an epoch of one source, apart from training: all of it once, unshuffled;
        records packed as in training, and texts from their beginning, in pieces as long as a row.
        Beside each batch, which has no cursor, stands what the segments of each of this host's rows
        are of."""
        recipe, rows, carried = self._recipe, list[packing.Row](), list[order.Block]()
        texts = self.texts[source]
        if isinstance(texts, Records):
            packer, windows = recipe.packer(), whole.in_order(texts, source, window=_WINDOW)
        else:
            pieces = whole.Pieces(recipe.maker, recipe.seq_len)
            packer = packing.Packer(
                recipe.maker, seq_len=recipe.seq_len, seed=recipe.masks, whole=pieces
            )
            windows = pieces.in_order(texts, source, ends=recipe.ends, window=_WINDOW)
        for blocks, last in windows:
            packed, carried = packer.rows([*carried, *blocks], flush=last)
            rows += packed
            while len(rows) >= recipe.batch or (last and rows):
                chosen, rows = rows[: recipe.batch], rows[recipe.batch :]
                batch, found = recipe.empty(self._rows), []
                for index, row in enumerate(self._mine):
                    placed = chosen[row] if row < len(chosen) else []
                    made = [(one, example) for one in placed if (example := recipe.example(one))]
                    lengths = recipe.maker.lengths(recipe.seq_len)
                    packing.lay(batch, index, [example for _, example in made], lengths=lengths)
                    found.append([one.block for one, _ in made])
                yield batch, found

    def examples(self) -> Iterator[tuple[order.Block, Batch]]:
        """The examples from the beginning, each as a batch of one row; and what each is of."""
        recipe = self._recipe
        lengths = recipe.maker.lengths(recipe.seq_len)
        for row, _ in self._plan.rows(self._plan.beginning()):
            for placed in row:
                if (example := recipe.example(placed)) is not None:
                    batch = recipe.empty(1)
                    packing.lay(batch, 0, [example], lengths=lengths)
                    yield placed.block, batch

    def origin(self, block: order.Block) -> str:
        """Where a document is from: its source and its number, or the file and line of a record."""
        held = self.documents[block.source]
        if isinstance(held, RecordDocuments):
            return held.origin(block.document)
        return f'{self.labels[block.source]}, document {block.document}'

    def sizes(self, source: int) -> np.ndarray:
        """Of records the positions that each takes in each stream [D, S], -1 where it gives no
        example; of texts their tokens [D, 1]."""
        if self._recipe.whole is not None:
            return self._recipe.whole.sizes(source)
        return np.diff(self.texts[source].offsets)[:, None]

    def filled(self) -> tuple[int, np.ndarray]:
        """Rows of all that a loader of `epochs` reads, and the share of the positions of each
        stream that are used; by what was planned."""
        room = np.array([*self._recipe.maker.lengths(self._recipe.seq_len).values()])
        used, rows = np.zeros(len(room)), 0
        for row, _ in self._plan.rows(self._plan.beginning()):
            used += np.sum([placed.sizes for placed in row], axis=0)
            rows += 1
        return rows, used / (max(rows, 1) * room)

    def will_read(self, batches: int) -> dict[str, float]:
        """What so many batches will have read, as `read` tells it: measured in a sample."""
        return self._told(forecast.reading(self._plan, batches * self._recipe.batch))

    def batches(self, epochs: float) -> int:
        """How many batches read the text so often, to the nearest: measured in a sample. Of several
        sources, as much text is read as all of them hold together, so often."""
        rows = forecast.rows_for(self._plan, epochs * sum(self._recipe.units))
        return max(1, round(rows / self._recipe.batch))

    def _told(self, counts: forecast.Read) -> dict[str, float]:
        whole = sum(units for units, _ in counts)
        told: dict[str, float] = {}
        for label, all_, (units, documents) in zip(
            self.labels, self._recipe.units, counts, strict=True
        ):
            end = f'/{label}' if len(counts) > 1 else ''
            told[f'epochs{end}'] = units / max(all_, 1)
            told[f'documents{end}'] = documents
            if end:
                told[f'share{end}'] = units / max(whole, 1)
        return told

    def close(self) -> None:
        """Ends the thread or the processes. A second call does nothing."""
        self._iterator = None
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _merge(self, parts: list[Batch]) -> Batch:
        """Worker i has rows i, i + n, i + 2n, ... of this host."""
        merged: Batch = {'cursor': parts[0]['cursor']}
        for key, first in parts[0].items():
            if key == 'cursor':
                continue
            merged[key] = np.empty((self._rows, *first.shape[1:]), first.dtype)
            for i, part in enumerate(parts):
                merged[key][i :: self._workers] = part[key]
        return merged

    def _warn_of_repetition(self) -> None:
        """Say where a batch holds more than all of the text."""
        recipe = self._recipe
        if recipe.whole is not None:
            count, most = sum(map(len, self.texts)), recipe.maker.segments(recipe.seq_len)
            needed = zip(recipe.whole.positions, recipe.whole.room, strict=True)
            full = any(positions >= recipe.batch * room for positions, room in needed)
            if full or 0 < recipe.batch * most <= count:
                return
            tell(
                f'the {count:,} records of training fill less than a batch of '
                f'{recipe.batch} x {recipe.seq_len}: rows of a batch repeat the same records; give '
                'more, or lower --train.batch'
            )
            return
        units = sum(text.tokens + len(text) for text in self.texts)
        if units < recipe.batch * recipe.seq_len:
            log.warning(
                'the training text has %s tokens, less than a batch of %s x %s: rows of a batch '
                'repeat the same text; give more text, or lower --train.batch',
                f'{units:,}',
                recipe.batch,
                recipe.seq_len,
            )


class _Rows(grain.IterDataset):
    """The rows of this host in every batch. Grain gives every worker process a slice of them."""

    def __init__(self, recipe: Recipe, mine: list[int], cursor: Cursor) -> None:
        super().__init__()
        self._recipe, self._mine, self._cursor = recipe, mine, cursor

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keeps the rows of one worker (grain calls this on a worker's copy)."""
        del sequential_slice
        self._mine = self._mine[sl]

    def __iter__(self) -> grain.DatasetIterator:
        return _Stateless(self._batches())

    def _batches(self) -> Iterator[Batch]:
        recipe = self._recipe
        place = {row: index for index, row in enumerate(self._mine)}
        lengths = recipe.maker.lengths(recipe.seq_len)
        batch, filled = recipe.empty(len(place)), 0
        for row, cursor in recipe.plan().rows(self._cursor):
            if filled in place:
                packing.lay(batch, place[filled], recipe.examples(row), lengths=lengths)
            filled += 1
            if filled == recipe.batch:
                yield batch | {'cursor': cursor.dumps()}
                batch, filled = recipe.empty(len(place)), 0
        if filled:
            yield batch | {'cursor': cursor.dumps()}


class _Stateless(grain.DatasetIterator):
    """A generator as grain wants it. The cursor in the batches is the state; grain keeps none."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        super().__init__()
        self._batches = batches

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state: dict[str, int]) -> None:
        raise NotImplementedError('resume with the cursor of a batch')


def _fitted(recipe: Recipe, documents: Sequence[Documents], too_long: whole.TooLong) -> Recipe:
    """The recipe of records, once it is known which fit in a row. Raises UserError where some do
    not, and are not to be left out or cut."""
    records = tuple(text for text in recipe.texts if isinstance(text, Records))
    fits = whole.Whole(records, recipe.maker, recipe.seq_len, truncate=too_long == 'truncate')

    def example(block: order.Block, sizes: Sizes) -> Example | None:
        return recipe.example(packing.Placed(block, 0.0, sizes))

    held = [one for one in documents if isinstance(one, RecordDocuments)]
    return dataclasses.replace(recipe, whole=whole.check(fits, held, example, too_long=too_long))


def _read(cursor: str, n_sources: int) -> Cursor:
    try:
        found = Cursor.loads(cursor)
    except (ValueError, TypeError) as error:
        raise UserError(
            f'the saved place in the data cannot be read ({error}): an older version wrote it; '
            'begin again in another --workdir, with --start to keep what was learnt'
        ) from None
    if len(found.places) != n_sources:
        raise UserError(
            f'the saved place in the data is of {len(found.places)} sources, and there are '
            f'{n_sources}: go on with the sources that the run began with'
        )
    return found


def _ignore_interrupts(worker: int, workers: int) -> None:
    """A Ctrl-C goes to all processes of a terminal, and the data must go on until the training has
    saved its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _allow_grain_outside_of_absl() -> None:
    """Grain's worker processes read absl flags, which only absl programs parse."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

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
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from llama_jax.data import forecast, order, packing, sources, tokens
from llama_jax.data.config import DataConfig, labels
from llama_jax.data.pieces import Example, Maker, Piece
from llama_jax.data.plan import Cursor, Plan
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Batch = dict[str, Any]

_VERSION = 3
"""Of the order of rows: a cursor of another one leads elsewhere."""


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
    epochs: int | None
    layout: packing.Layout = dataclasses.field(default_factory=dict)

    def stream(self) -> order.Stream:
        """The blocks of all sources, in the order of this run."""
        return order.Stream(
            [blocks_of(text, self.seq_len) for text in self.texts],
            self.weights,
            seed=self.seed,
            share=self.share,
            epochs=self.epochs,
        )

    def plan(self) -> Plan:
        return Plan(
            self.stream(),
            packing.Packer(self.maker, seq_len=self.seq_len, seed=self.seed),
            self.texts,
            ends=self.maker.ends,
            batch=self.batch,
            seq_len=self.seq_len,
            seed=self.seed,
        )

    def examples(self, row: packing.Row) -> list[Example]:
        """The examples of a row. Randomness is keyed by seed, epoch, source, document and place."""
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
        key = [self.seed, block.epoch, block.source, block.document, block.start]
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


class Loader:
    """This host's share of the global batches, as dicts of numpy arrays.

    `rows` are those of the global batch to make here, where other hosts make the rest; default:
    all. A batch holds [B_local, T] arrays: every key that examples of `maker` have (integers as
    int32, the rest as float32; `inputs` and `targets` padded with pad_id, the rest with 0),
    `segments` (1, 2, ... for each piece of a document in the row, 0 for padding) and `positions`
    (from 0 in a segment); arrays of another stream are named 'STREAM/inputs', 'STREAM/segments'.
    `cursor`, a text of constant size and the same on all hosts, is the place behind this batch:
    give it back to go on from there, with any number of hosts and workers.

    `epochs=None` is training: endless. `epochs=n` is evaluation: every document n times, the last
    batch is filled up with padding rows. Both are shuffled by `seed`.

    Attributes:
        texts: the tokenised sources.
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
    ) -> None:
        if batch < 1 or seq_len < 1:
            raise UserError(f'a batch of {batch} rows of {seq_len} tokens: set both to 1 or more')
        if config.workers < 0 or config.prefetch < 0:
            raise UserError('data.workers and data.prefetch must be 0 or more')
        corpus = sources.open_sources(config, split)
        self.texts = tokens.tokenised(corpus, tokenizer)
        self.labels = labels(config.of(split))
        # Read to the end, sources get the shares that they have.
        weights = corpus.weights if epochs is None else tuple(max(t.tokens, 1) for t in self.texts)
        recipe = Recipe(
            self.texts, weights, config.share, tokenizer, maker, batch, seq_len, seed, epochs
        )
        self._plan = recipe.plan()
        # One example tells which arrays there are, so that a host without rows knows as well.
        self._recipe = dataclasses.replace(recipe, layout=_layout(recipe, self._plan))
        facts = (
            *(_VERSION, [text.digest for text in self.texts], weights, config.share),
            *(batch, seq_len, seed, epochs),
        )
        self.digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        self.seconds_waited = 0.0
        mine = list(range(batch)) if rows is None else list(rows)
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

    def will_read(self, batches: int) -> dict[str, float]:
        """What so many batches will have read, as `read` tells it: measured in a sample."""
        return self._told(forecast.reading(self._plan, batches * self._recipe.batch))

    def batches(self, epochs: float) -> int:
        """How many batches read the text so often, to the nearest: measured in a sample. Of several
        sources, as much text is read as all of them hold together, so often."""
        rows = forecast.rows_for(self._plan, epochs * sum(map(self._units, self.texts)))
        return max(1, round(rows / self._recipe.batch))

    def _units(self, texts: tokens.Texts) -> int:
        """Units of an epoch of a source."""
        return texts.tokens + self._recipe.maker.ends * len(texts)

    def _told(self, counts: forecast.Read) -> dict[str, float]:
        whole = sum(units for units, _ in counts)
        told: dict[str, float] = {}
        for label, texts, (units, documents) in zip(self.labels, self.texts, counts, strict=True):
            end = f'/{label}' if len(counts) > 1 else ''
            told[f'epochs{end}'] = units / max(self._units(texts), 1)
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
        batch, seq_len = self._recipe.batch, self._recipe.seq_len
        units = sum(text.tokens + len(text) for text in self.texts)
        if units < batch * seq_len:
            log.warning(
                'the training text has %s tokens, less than a batch of %s x %s: rows of a batch '
                'repeat the same text; give more text, or lower --train.batch',
                f'{units:,}',
                batch,
                seq_len,
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


def blocks_of(texts: tokens.Texts, seq_len: int) -> order.Blocks:
    """The documents of a source in blocks, for rows of `seq_len`: the same for every objective."""
    size = order.BLOCK_ROWS * seq_len
    return order.Blocks(texts.offsets, size, cache=texts.directory / f'blocks-{size}.npy')


def _layout(recipe: Recipe, plan: Plan) -> packing.Layout:
    for row, _ in plan.rows(plan.beginning()):
        for example in recipe.examples(row):
            return packing.layout_of(example, pad_id=recipe.tokenizer.pad_id)
    raise UserError('no document gives an example for this objective: use other data')


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

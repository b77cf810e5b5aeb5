"""Global batches of packed rows, read ahead of the training step.

Training runs in lanes. Lane r of B reads documents r, r + B, r + 2B, ... of one endless shuffled
stream, packs them one after another, and gives row r of every global batch. So a batch depends
neither on the number of hosts, nor of workers, nor on how far they read ahead, and the state to
resume from is two integers per lane which travel with the batch. Evaluation is one lane, whose rows
are dealt out to the batch, so that no row waits for a long document and all hosts see equally many
batches.
"""

import dataclasses
import hashlib
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import grain
import numpy as np
from absl import flags

from llama_jax.data import order, packing, sources
from llama_jax.data.config import DataConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError

Batch = dict[str, np.ndarray]


class MakeExamples(Protocol):
    """`objective.example`: what an objective makes of one document."""

    def __call__(
        self, tokens: np.ndarray, *, tokenizer: Tokenizer, seq_len: int, rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Examples (1-D arrays of one length, the same keys always) of the document `tokens`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that makes rows from documents; travels to worker processes."""

    corpus: sources.Corpus
    tokenizer: Tokenizer
    example: MakeExamples
    seq_len: int
    splittable: bool
    seed: int
    lengths: packing.Lengths
    segments: int
    layout: packing.Layout = dataclasses.field(default_factory=dict)

    def examples(self, entry: order.Entry) -> list[dict[str, np.ndarray]]:
        """The examples of one document. Its randomness is keyed by seed, epoch and record."""
        source, epoch, record = entry
        return self.example(
            self.tokenizer.encode(self.corpus.sources[source][record]),
            tokenizer=self.tokenizer,
            seq_len=self.seq_len,
            rng=np.random.default_rng([self.seed, epoch, source, record]),
        )

    def packer(
        self, examples: Callable[[int], list[packing.Example] | None], cursor: Sequence[int]
    ) -> packing.Packer:
        """A packer of these examples into rows of this recipe."""
        return packing.Packer(
            examples,
            layout=self.layout,
            lengths=self.lengths,
            splittable=self.splittable,
            segments=self.segments,
            patience=sum(self.corpus.sizes),
            cursor=(int(cursor[0]), int(cursor[1])),
        )


class Loader:
    """This host's share of the global batches, as dicts of numpy arrays.

    `rows` are those of the global batch to make here, where other hosts make the rest; default:
    all. A batch holds [B_local, T] arrays: every key that `example` yields (integers as int32, the
    rest as float32; `inputs` and `targets` padded with pad_id, the rest with 0), `segments` (1, 2,
    ... for each piece of a document in the row, 0 for padding) and `positions` (from 0 in a
    segment). `lengths` gives the T of each stream (default: one stream of `seq_len`), whose arrays
    are named 'STREAM/inputs', 'STREAM/segments'; `segments` the most examples of a row.
    `cursor` int32 [B_local, 2] is the state after this batch: documents consumed by the lane, and
    tokens taken of the next one. Give the global [B, 2] array back as `cursor` to go on from there,
    with any number of hosts and workers.

    `epochs=None` is training: endless and shuffled. `epochs=n` is evaluation: every document n
    times in stored order, sources one after another, and the last batch is filled up with padding
    rows; all hosts get equally many batches.

    Attributes:
        corpus: the open sources.
        digest: hash of everything that decides the batches apart from `example`; a cursor makes
            sense for an equal digest only.
        seconds_waited: time that `next` spent waiting for a batch, since the start.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Literal['train', 'validation'],
        tokenizer: Tokenizer,
        example: MakeExamples,
        splittable: bool,
        batch: int,
        seq_len: int,
        seed: int,
        lengths: packing.Lengths | None = None,
        segments: int = 0,
        rows: Sequence[int] | None = None,
        cursor: np.ndarray | None = None,
        epochs: int | None = None,
    ) -> None:
        if batch < 1 or seq_len < 1:
            raise UserError(f'a batch of {batch} rows of {seq_len} tokens: set both to 1 or more')
        if config.workers < 0 or config.prefetch < 0:
            raise UserError('data.workers and data.prefetch must be 0 or more')
        cursor = _checked(cursor, batch)
        self.corpus = sources.open_sources(config, split)
        lengths = lengths or {'': seq_len}
        recipe = Recipe(
            self.corpus, tokenizer, example, seq_len, splittable, seed, lengths, segments
        )
        # One document tells which arrays there are, so that a host without documents knows as well.
        self._recipe = dataclasses.replace(recipe, layout=_layout(recipe))
        facts = (self.corpus.digest, tokenizer.digest, batch, seq_len, seed, splittable, epochs)
        self.digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        self.seconds_waited = 0.0
        mine = list(range(batch)) if rows is None else list(rows)
        self._rows = len(mine)
        self._workers = min(config.workers, self._rows) if epochs is None else 0
        dataset: grain.IterDataset
        if epochs is None:
            dataset = _LaneRows(self._recipe, mine, cursor)
        else:
            dataset = _DealtRows(self._recipe, batch, mine, epochs, cursor)
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

    def __iter__(self) -> 'Loader':
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
        """A batch of padding rows only, of the shapes of every batch."""
        batch = packing.empty_rows(
            self._recipe.layout, rows=self._rows, lengths=self._recipe.lengths
        )
        return batch | {'cursor': np.zeros((self._rows, 2), np.int32)}

    def close(self) -> None:
        """Ends the thread or the processes. A second call does nothing."""
        self._iterator = None
        self._finalizer()

    def __enter__(self) -> 'Loader':
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _merge(self, parts: list[Batch]) -> Batch:
        """Worker i has lanes i, i + n, i + 2n, ... of this host."""
        merged = {}
        for key, first in parts[0].items():
            merged[key] = np.empty((self._rows, *first.shape[1:]), first.dtype)
            for i, part in enumerate(parts):
                merged[key][i :: self._workers] = part[key]
        return merged


class _LaneRows(grain.IterDataset):
    """Endless; row by lane. Grain gives every worker process a slice of the lanes."""

    def __init__(self, recipe: Recipe, lanes: list[int], cursor: np.ndarray) -> None:
        super().__init__()
        self._recipe, self._lanes, self._cursor = recipe, lanes, cursor

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keeps the lanes of one worker (grain calls this on a worker's copy)."""
        del sequential_slice
        self._lanes = self._lanes[sl]

    def __iter__(self) -> grain.DatasetIterator:
        recipe, lanes, cursor = self._recipe, self._lanes, self._cursor
        stream = order.training_order(recipe.corpus.sizes, recipe.corpus.weights, seed=recipe.seed)

        def packer(lane: int) -> packing.Packer:
            return recipe.packer(
                lambda k: recipe.examples(stream[lane + k * len(cursor)]), cursor[lane]
            )

        packers = [packer(lane) for lane in lanes]

        def batches() -> Iterator[Batch]:
            while True:
                batch = packing.empty_rows(recipe.layout, rows=len(lanes), lengths=recipe.lengths)
                for index, lane_packer in enumerate(packers):
                    lane_packer.fill(batch, index)
                batch['cursor'] = np.array([p.cursor for p in packers], np.int32)
                yield batch

        return _Stateless(batches())


class _DealtRows(grain.IterDataset):
    """Finite; the rows of one stream, of which this host keeps its share of every batch."""

    def __init__(
        self, recipe: Recipe, batch: int, mine: list[int], epochs: int, cursor: np.ndarray
    ) -> None:
        super().__init__()
        self._recipe, self._batch, self._mine = recipe, batch, mine
        self._epochs, self._cursor = epochs, cursor

    def __iter__(self) -> grain.DatasetIterator:
        recipe, mine = self._recipe, self._mine
        entries = order.evaluation_order(recipe.corpus.sizes, epochs=self._epochs)
        packer = recipe.packer(
            lambda k: recipe.examples(entries[k]) if k < len(entries) else None, self._cursor[0]
        )

        def batches() -> Iterator[Batch]:
            while True:
                batch = packing.empty_rows(recipe.layout, rows=self._batch, lengths=recipe.lengths)
                if not [True for index in range(self._batch) if packer.fill(batch, index)]:
                    return
                # The state of the one stream, in every row.
                batch['cursor'] = np.tile(np.array(packer.cursor, np.int32), (self._batch, 1))
                yield {key: rows[mine] for key, rows in batch.items()}

        return _Stateless(batches())


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


def _layout(recipe: Recipe) -> packing.Layout:
    for entry in order.evaluation_order(recipe.corpus.sizes, epochs=1):
        for example in recipe.examples(entry):
            return packing.layout_of(example, pad_id=recipe.tokenizer.pad_id)
    raise UserError('no document gives an example for this objective: use other data')


def _checked(cursor: np.ndarray | None, batch: int) -> np.ndarray:
    if cursor is None:
        return np.zeros((batch, 2), np.int32)
    cursor = np.asarray(cursor)
    if cursor.shape != (batch, 2):
        raise UserError(
            f'the saved data cursor has shape {list(cursor.shape)} and not [{batch}, 2]: go on '
            'with the batch size it was saved with'
        )
    return cursor


def _ignore_interrupts(worker: int, workers: int) -> None:
    """A Ctrl-C goes to all processes of a terminal, and the data must go on until the training has
    saved its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _allow_grain_outside_of_absl() -> None:
    """Grain's worker processes read absl flags, which only absl programs parse."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

"""The records of a source as an objective encodes them, on disk beside the tokens of texts.

Made once for each tokenizer, chat format and setting of the objective that they depend on. A record
that the objective cannot learn from has no tokens, and is noted with the reason: it is told before
anything is compiled.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_jax.data.documents import RecordDocuments
from llama_jax.data.pieces import Encoded, Maker, identity_of
from llama_jax.data.record import BadRecordError
from llama_jax.data.schemas import NAMES
from llama_jax.data.schemas import VERSION as SCHEMAS
from llama_jax.data.sources import Corpus
from llama_jax.data.tokens import Part, Texts, damaged, kept, mapped
from llama_jax.errors import UserError
from llama_jax.text.chat import ChatFormat
from llama_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_VERSION = 1
_NAMED = 10
"""Bad records that are told one by one."""
MEND_BAD = 'mend or remove these, or leave them out (--data.bad-records drop)'
_LENGTHS, _NUMBERS, _BAD = 'lengths', 'numbers', 'bad.json'


@dataclasses.dataclass(frozen=True)
class Records(Texts):
    """Records as token ids: the parts of each stand one after another as if they were a text."""

    n_parts: int
    """Parts of each record; those that have fewer end in empty ones."""
    bad: int
    """Records that the objective cannot learn from."""

    def encoded(self, document: int) -> Encoded:
        """A record by its number."""
        ends = np.cumsum(self.lengths[document])[:-1]
        tokens = np.split(np.asarray(self[document], np.int32), ends)
        weights = np.split(np.asarray(self._weights(document)), ends)
        return Encoded(tuple(tokens), tuple(weights), float(self.numbers[document]))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each part of each record: int32 [D, P], on disk."""
        lengths = mapped(self.directory / _LENGTHS, 'int32', (len(self), self.n_parts))
        if not np.array_equal(lengths.sum(1), np.diff(self.offsets)):
            raise damaged(self.directory / _LENGTHS, 'its lengths are not those of the tokens')
        return lengths

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """`Encoded.number` of each record: float64 [D], on disk."""
        return mapped(self.directory / _NUMBERS, 'float64', (len(self),))

    @functools.cached_property
    def loss_tokens(self) -> int:
        """Tokens of all records that bear loss."""
        ends = self.offsets[list(self.parts)]
        count = 0
        for part, size in enumerate(np.diff(ends).tolist()):
            path = self.directory / f'{part:05}.weights'
            count += int(np.count_nonzero(mapped(path, 'float32', (size,))))
        return count

    def problems(self) -> dict[int, str]:
        """What is wrong with the bad records, by their numbers."""
        try:
            return {int(n): said for n, said in json.loads(self._bad.read_text()).items()}
        except (OSError, ValueError) as error:
            raise damaged(self._bad, str(error)) from error

    def checksum(self, document: int) -> int:
        return _identity(self.encoded(document))

    @property
    def _bad(self) -> Path:
        return self.directory / _BAD

    def _weights(self, document: int) -> np.ndarray:
        return self.of_tokens(document, 'weights', 'float32')

    @staticmethod
    def gathered(tasks: Sequence[Part], directory: Path) -> dict[str, Any]:
        found = [np.load(task.path.with_suffix('.facts.npz')) for task in tasks]
        n_parts = max((x['lengths'].shape[1] for x in found), default=0)
        with (directory / _LENGTHS).open('wb') as lengths, (directory / _NUMBERS).open('wb') as n:
            for facts in found:
                missing = n_parts - facts['lengths'].shape[1]
                lengths.write(np.pad(facts['lengths'], ((0, 0), (0, missing))).tobytes())
                n.write(facts['numbers'].tobytes())
        bad: dict[str, str] = {}
        for task in tasks:
            bad |= json.loads(task.path.with_suffix('.bad.json').read_text())
        (directory / _BAD).write_text(json.dumps(bad, ensure_ascii=False))
        for task in tasks:
            for suffix in ('.facts.npz', '.bad.json'):
                task.path.with_suffix(suffix).unlink()
        return {'n_parts': n_parts, 'bad': len(bad)}


@dataclasses.dataclass(frozen=True)
class RecordPart(Part):
    """Some records of a source, to be encoded by one process."""

    documents: RecordDocuments
    maker: Maker
    chat: ChatFormat | None

    def run(self, seen: Callable[[int], None]) -> None:
        rows = np.zeros((len(self.numbers), 3), np.int64)
        lengths: list[tuple[int, ...]] = []
        numbers = np.zeros(len(self.numbers))
        bad: dict[int, str] = {}
        each = self.documents.bytes // max(len(self.documents), 1)
        with (
            self.path.with_suffix('.tokens').open('wb') as tokens,
            self.path.with_suffix('.weights').open('wb') as weights,
        ):
            for i, number in enumerate(self.numbers):
                try:
                    encoded = self._encoded(number)
                except (BadRecordError, UserError) as error:
                    bad[number] = str(error)
                    encoded = Encoded((), ())
                for ids, of_part in zip(encoded.parts, encoded.weights, strict=True):
                    tokens.write(ids.astype(self.dtype).tobytes())
                    weights.write(of_part.astype(np.float32).tobytes())
                lengths.append(tuple(map(len, encoded.parts)))
                numbers[i] = encoded.number
                rows[i] = sum(lengths[-1]), _identity(encoded), each
                seen(each)
        n_parts = max(map(len, lengths), default=0)
        filled = [(*of_parts, *(0,) * (n_parts - len(of_parts))) for of_parts in lengths]
        np.savez(
            self.path.with_suffix('.facts.npz'),
            lengths=np.array(filled, np.int32).reshape(len(filled), n_parts),
            numbers=numbers,
        )
        self.path.with_suffix('.bad.json').write_text(json.dumps(bad, ensure_ascii=False))
        self.finish(rows)

    def _encoded(self, number: int) -> Encoded:
        record = self.documents.record(number, self.maker.reads)
        encoded = self.maker.encoded(record, vocabulary=self.tokenizer, chat=self.chat)
        for ids, weights in zip(encoded.parts, encoded.weights, strict=True):
            if len(ids) != len(weights):
                raise ValueError(f'{len(ids)} tokens with {len(weights)} weights')
        if not sum(map(len, encoded.parts)):
            raise BadRecordError('gives no tokens')
        return encoded


def _identity(encoded: Encoded) -> int:
    lengths = np.array([*map(len, encoded.parts)], np.int32)
    lengths = lengths[: int(np.flatnonzero(lengths).max(initial=-1)) + 1]  # see `n_parts`
    ids = np.concatenate([*encoded.parts, lengths])
    more = [weights.astype('<f4').tobytes() for weights in encoded.weights]
    return identity_of(ids, b''.join([*more, np.float64(encoded.number).tobytes()]))


def encoded(
    corpus: Corpus,
    tokenizer: Tokenizer,
    maker: Maker,
    chat: ChatFormat | None,
    *,
    bad: Literal['refuse', 'drop'] = 'refuse',
    processes: int | None = None,
) -> tuple[Records, ...]:
    """The sources of a corpus as `maker` encodes their records; those that are not there yet are
    made first.

    Raises UserError that names the first ten records which the maker cannot learn from; where they
    are to be dropped, they are counted in the log, and have no tokens.
    """
    made, told = list[Records](), list[str]()
    for documents in corpus.sources:
        assert isinstance(documents, RecordDocuments)
        identity = (
            *(_VERSION, SCHEMAS, documents.digest, tokenizer.digest),
            *(type(maker).__module__, type(maker).__qualname__, maker.encoding, chat),
        )
        part = functools.partial(RecordPart, documents, tokenizer, maker=maker, chat=chat)
        records = kept(documents, repr(identity), part, Records, processes)
        made.append(records)
        if said := _bad_records(documents, records, maker):
            told.append(said)
    if told and bad == 'refuse':
        some = any(0 < records.bad < len(records) for records in made)
        raise UserError(f'{"; ".join(told)}{f": {MEND_BAD}" if some else ""}')
    for line in told:
        tell(f'left out: {line}')
    for documents, records in zip(corpus.sources, made, strict=True):
        if not records.tokens:
            raise UserError(
                f'{documents.name!r} has no record that {type(maker).__name__} can learn from: of '
                f'{len(records):,} none is left'
            )
    return tuple(made)


def _bad_records(documents: RecordDocuments, records: Records, maker: Maker) -> str:
    """The first bad records of a source in one line, those of one problem together; '' where there
    are none."""
    if not records.bad:
        return ''
    problems = records.problems()
    by_problem: dict[str, list[int]] = collections.defaultdict(list)
    for number in sorted(problems)[:_NAMED]:
        by_problem[problems[number]].append(number)
    named = '; '.join(
        f'{places(documents, numbers)}: {problem}' for problem, numbers in by_problem.items()
    )
    more = f'; and {len(problems) - _NAMED:,} more' if len(problems) > _NAMED else ''
    kind = f'{NAMES[maker.reads]} that {type(maker).__name__} can learn from'
    if len(problems) == len(records) and len({*problems.values()}) == 1:
        first = places(documents, [0])
        return f'none of {len(records):,} records is among the {kind}, as {first}: {problems[0]}'
    return f'{len(problems):,} of {len(records):,} records are no {kind}: {named}{more}'


def places(documents: RecordDocuments, numbers: Iterable[int]) -> str:
    """Where records are from: each file once, with the lines in it."""
    said: list[str] = []
    last = ''
    for origin in map(documents.origin, numbers):
        file, mark, line = origin.rpartition(' ' if documents.features else ':')
        said.append(line if file == last else f'{file}{mark}{line}')
        last = file
    return ', '.join(said)


@functools.cache  # once, however often the data is opened
def tell(line: str) -> None:
    """Log a warning that a process says once."""
    log.warning(line)

"""The documents that a suite is measured on: held out of the run's training, whatever it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data import text_files
from llama_jax.data.config import FILES, DataConfig, Source
from llama_jax.data.documents import Documents, RecordDocuments
from llama_jax.data.record import Record as Reads
from llama_jax.data.record import Text
from llama_jax.data.sources import builder, count, has, open_sources, overlap
from llama_jax.errors import UserError
from llama_jax.evaluate.examples import Record

OWN = 'own'
"""What a run itself was trained on, instead of the name of a data set."""

_PAIRS_OF = {
    f'python_corpus/{where}_code': f'python_corpus/{where}_docs'
    for where in ('stdlib', 'installed')
}
"""Where the pairs of a data set of plain text are: the docstrings of the same held-out modules."""
_DOCUMENTS = 4096
_CHARACTERS = 1 << 16
"""Of a set and of a document, at most: what is read does not grow with the corpus."""


class Held(NamedTuple):
    """Opened data sets."""

    test: tuple[Documents, ...]
    """What figures are taken on."""
    validation: tuple[Documents, ...] = ()
    """Held out as well, and seen by choices, such as that of the learning rate."""
    train: tuple[Documents, ...] = ()
    splits: tuple[str, ...] = ()
    """Of `test`, for the record."""
    selection: tuple[str, ...] = ()
    """Names of those of `test` that choices of a run see as well: of its rate, its best checkpoint.
    """

    @property
    def names(self) -> str:
        return ', '.join(dict.fromkeys(documents.name for documents in self.test))

    @property
    def digest(self) -> tuple[str, ...]:
        """Of the contents of all."""
        every = (*self.test, *self.validation, *self.train)
        return tuple(documents.digest for documents in every)


def of_run(data: DataConfig, reads: type[Reads]) -> Held:
    """The sets of --data.validate where a run has some; else of each source `test_split`, and where
    that has no two documents the one that the run validates on as well. Raises UserError for a test
    split that a source does not have, or that is trained on."""
    train = open_sources(data, 'train', reads).sources
    sets = data.of('validation')
    if data.validation:
        splits = tuple(source.split or '' for source in sets)
        test = open_sources(data, 'validation', reads).sources
        return Held(test, (), train, splits, tuple(dict.fromkeys(x.name for x in test)))
    own: list[Source] = []
    validation: list[Source] = []
    selection: list[str] = []
    for source, of_run in zip(sets, data.sources, strict=True):
        apart = None if of_run.split else _test(data, source, reads)
        if apart is None:
            own.append(source)
            selection.append(source.name)
            continue
        own.append(dataclasses.replace(source, split=data.test_split))
        (validation if apart.documents > 1 else own).append(source)
        if apart.selected or apart.documents == 1:
            selection.append(source.name)
    return Held(
        _opened(data, own, reads),
        _opened(data, validation, reads),
        train,
        tuple(dict.fromkeys(source.split or '' for source in own)),
        tuple(dict.fromkeys(selection)),
    )


class _Test(NamedTuple):
    """The test split of a source."""

    documents: int
    selected: bool
    """Whether validation has documents of it too."""


def _test(data: DataConfig, source: Source, reads: type[Reads]) -> _Test | None:
    """None for a source that has none of its own."""
    split, data_set = data.test_split, builder(source, reads=reads)
    if not has(data_set, split):
        if split == DataConfig.test_split:
            return None
        raise UserError(
            f'--data.test-split {split}: {source.name} has {", ".join(data_set.info.splits)}'
        )
    n = count(data_set, source, split)
    if not n:
        return None
    for trained in data.of('train'):
        same = dataclasses.replace(trained, split=source.split, weight=source.weight) == source
        if same and overlap(data_set, split, trained.split or 'all'):
            raise UserError(
                f'the split {split} of {source.name}, which figures are of, is trained on as well '
                f'(as {trained.split}): train with another --data.test-split, or measure on '
                'another data set (--suite.text NAME)'
            )
    if source.split == split:
        return None
    validated = source.split or data.validation_split
    read = has(data_set, validated) and count(data_set, source, validated) > 0
    return _Test(n, read and overlap(data_set, split, validated))


def of_name(name: str) -> Held:
    """The splits of a data set. Raises UserError for the name of a file."""
    if Path(name).expanduser().is_file():
        raise UserError(
            f'{name!r} is a file, and a suite takes the name of a data set; what a run makes of '
            f'files says experiments.evaluate --from RUN --text {name}'
        )
    known = builder(Source(name)).info.splits
    held = [split for split in ('test', 'validation') if split in known]
    if not held:
        raise UserError(
            f'{name!r} has neither a split test nor validation ({", ".join(known)}): nothing of it '
            'is held out; name another data set, or own'
        )
    first, *other = ((_open(name, split),) for split in held)
    train = (_open(name, 'train'),) if 'train' in known else ()
    return Held(first, other[0] if other else (), train, tuple(held[:1]))


def pairs_name(text: str, pairs: str, data: DataConfig) -> str:
    """The data set of pairs, `own` for the fields of the text itself, '' for none."""
    if pairs != OWN:
        return pairs
    names = [text] if text != OWN else [source.name for source in data.sources]
    beside = {_PAIRS_OF[name] for name in names if name in _PAIRS_OF}
    return beside.pop() if len(beside) == 1 and not data.validation else OWN


def records(
    sets: Sequence[Documents],
    *,
    group: str,
    label: str = '',
    pair: Sequence[str] = (),
    selection: bool = False,
    whole: bool = False,
) -> list[Record]:
    """Documents as records, at most 4096, spread evenly over each set, and of each the beginning.

    `group`, `label` and `pair` are names of fields; one that a document lacks is ''. Without a
    group each document is one by itself. `selection`: whether choices see these sets; `whole`:
    whether the records of files are read though the first of them has none of these fields.
    """
    found = []
    for number, documents in enumerate(sets):
        n = min(len(documents), _DOCUMENTS // len(sets))
        numbers = np.linspace(0, len(documents), n, endpoint=False).astype(int).tolist()
        beside = _of_files(documents, tuple(numbers), {group, label, *pair}, whole)
        for i in numbers:
            fields = _fields(documents, i, beside)
            named = fields.get(group)
            found.append(
                Record(
                    documents[i][:_CHARACTERS],
                    named or f'{"selection " * selection}{number}:{i}',
                    fields.get(label, ''),
                    (fields.get(pair[0], ''), fields.get(pair[1], '')) if pair else ('', ''),
                    selection,
                    bool(named),
                )
            )
    return found


def _of_files(
    documents: Documents, numbers: tuple[int, ...], names: set[str], whole: bool
) -> dict[str, dict[str, Any]]:
    """The records of files that documents of text were taken from, by their origins; kept for the
    next arm."""
    if documents.name not in FILES or isinstance(documents, RecordDocuments):
        return {}
    key = documents.digest, numbers
    if key not in _RECORDS:
        if not (whole or names & text_files.fields_of(documents.source)):
            return {}
        while len(_RECORDS) > 2:
            del _RECORDS[next(iter(_RECORDS))]
        origins = {documents.stored(i)['origin'].decode() for i in numbers}
        _RECORDS[key] = text_files.whole_records(documents.source, origins)
    return _RECORDS[key]


_RECORDS: dict[tuple[str, tuple[int, ...]], dict[str, dict[str, Any]]] = {}


def _fields(
    documents: Documents, index: int, beside: Mapping[str, dict[str, Any]]
) -> dict[str, str]:
    """The fields of a document that are texts, or numbers of classes; of files also `file`."""
    stored = documents.stored(index)
    if isinstance(documents, RecordDocuments):
        fields = documents.fields(index)
    else:
        fields = {
            name: x.decode('utf-8', 'replace') if isinstance(x, bytes) else x
            for name, x in stored.items()
        }
        fields |= beside.get(str(fields.get('origin')), {})
    found = {name: str(x) for name, x in fields.items() if isinstance(x, str | int | np.integer)}
    if documents.name in FILES and isinstance(stored.get('origin'), bytes):
        found['file'] = stored['origin'].decode('utf-8', 'replace').rpartition(':')[0]
    return found


def _open(name: str, split: str) -> Documents:
    (documents,) = _opened(DataConfig(), [Source(name, split=split)], Text)
    return documents


def _opened(data: DataConfig, sets: Sequence[Source], reads: type[Reads]) -> tuple[Documents, ...]:
    if not sets:
        return ()
    return open_sources(dataclasses.replace(data, sources=tuple(sets)), 'train', reads).sources

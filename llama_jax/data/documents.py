"""What an opened source holds, read by index: texts, or records of any fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from llama_jax.data.config import Source
from llama_jax.data.record import BadRecordError
from llama_jax.data.schemas import Kind, record_of
from llama_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of one source and split, read by index.

    Travels to worker processes, where its files are opened anew.
    """

    name: str
    records: Sequence[dict[str, Any]]
    field: str
    digest: str  # of the data set's name, version, split, size and field
    bytes: int  # of the records on disk, about
    damaged: Callable[[object], UserError]  # what to say where a record cannot be read
    source: Source

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        return self.stored(index)[self.field].decode('utf-8', errors='replace')

    def stored(self, index: int) -> dict[str, Any]:
        """All fields of a record as they are stored."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # which also ends a for loop
        try:
            return self.records[index]
        except Exception as error:  # of array_record, of protocol buffers
            raise self.damaged(error) from error


@dataclasses.dataclass(frozen=True)
class RecordDocuments(Documents):
    """Documents that are records of an objective; as texts they are all that is said in them."""

    features: tfds.features.FeaturesDict | None
    """Of a data set of others; None where `field` holds records of files, as JSON."""
    rename: tuple[tuple[str, str], ...]
    """(name, field): what is called `name` is in `field`."""

    def __getitem__(self, index: int) -> str:
        return '\n'.join(_texts(self.fields(index)))

    def fields(self, index: int) -> dict[str, Any]:
        """A record as plain values, under the names that data/schemas.py knows."""
        stored = self.stored(index)
        if self.features is None:
            fields = json.loads(stored[self.field])
        else:
            fields = {name: plain(self.features[name], stored[name]) for name in self.features}
        renamed = {name: fields.get(field) for name, field in self.rename}
        # Under its former name it would be taken for something else.
        left = {field for _, field in self.rename} - renamed.keys()
        return {name: x for name, x in fields.items() if name not in left} | renamed

    def record(self, index: int, kind: type[Kind]) -> Kind:
        """A record of the type `kind`. Raises BadRecordError."""
        return record_of(self.fields(index), kind)

    def origin(self, index: int) -> str:
        """The file and the line of a record; of a data set of others, its number from 0 on."""
        if self.features is None:
            return self.stored(index)['origin'].decode()
        return f'record {index}'


def plain(feature: Any, value: Any) -> Any:
    """A stored value as JSON knows them: text for bytes, names for the numbers of classes, and a
    list of objects for a sequence of them."""
    if isinstance(feature, tfds.features.ClassLabel):
        number = int(value)
        return feature.int2str(number) if number >= 0 else None  # -1: nobody has labelled it
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: plain(feature[name], value[name]) for name in feature}
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        if isinstance(inner, tfds.features.FeaturesDict) and isinstance(value, Mapping):
            rows = zip(*(value[name] for name in inner), strict=True)
            value = [dict(zip(inner, row, strict=True)) for row in rows]
        return [plain(inner, one) for one in value]
    if isinstance(value, bytes):
        return value.decode('utf-8', errors='replace')
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def records(documents: RecordDocuments, kind: type[Kind]) -> Iterator[Kind | BadRecordError]:
    """Every record in stored order, or what is wrong with it."""
    for index in range(len(documents)):
        try:
            yield documents.record(index, kind)
        except BadRecordError as error:
            yield error

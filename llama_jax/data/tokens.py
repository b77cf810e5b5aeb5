"""The tokenised cache: token ids of every document of a source, on disk, read by index.

A source is tokenised once per tokenizer, part by part. What is finished stays, also after kill -9,
and the next start goes on with the rest. Rows are planned from the lengths that are kept here, and
only the text of one's own rows is read.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llama_jax import installed
from llama_jax.data import workers
from llama_jax.data.config import cache_dir
from llama_jax.data.documents import Documents
from llama_jax.data.pieces import identity_of
from llama_jax.data.prepare import locked
from llama_jax.data.progress import Progress
from llama_jax.data.sources import Corpus
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer

_PART_BYTES = 8 * 2**20
_MOST_PARTS = 1024
_MOST_OPEN = 64  # files of parts: each holds a descriptor, and many systems allow 1,024
_FEW_BYTES = 32 * 2**20  # for which more processes are not worth their start
_VERSION = 1
_REMEDY = (
    f'the same command goes on; {installed.command("prepare")} --processes 1 takes less memory'
)
_FACTS, _OFFSETS, _IDENTITIES = 'tokens.json', 'offsets', 'identities'


@dataclasses.dataclass(frozen=True)
class Texts:
    """The documents of one source and split as token ids.

    Travels to worker processes, where its files are opened anew.
    """

    name: str
    directory: Path
    digest: str
    """Of the documents and the tokenizer."""
    parts: tuple[int, ...]
    """Number of the first document of each part, and of all documents."""
    tokens: int
    """Of all documents."""
    bytes: int
    """UTF-8 bytes of all documents."""
    dtype: str

    def __len__(self) -> int:
        return self.parts[-1]

    def __getitem__(self, document: int) -> np.ndarray:
        """Token ids [n] of a document, as they lie on disk."""
        return self.of_tokens(document, 'tokens', self.dtype)

    def of_tokens(self, document: int, suffix: str, dtype: str) -> np.ndarray:
        """What the files of one suffix hold of each token of a document [n]."""
        if not 0 <= document < len(self):
            raise IndexError(document)
        part = bisect.bisect_right(self.parts, document) - 1
        begin, start, stop = (
            int(self.offsets[i]) for i in (self.parts[part], document, document + 1)
        )
        size = int(self.offsets[self.parts[part + 1]]) - begin
        values = self._opened(self.directory / f'{part:05}.{suffix}', dtype, (size,))
        return values[start - begin : stop - begin]

    def check(self, document: int) -> None:
        """Raise UserError for a document whose tokens are no longer those that were written."""
        if self.checksum(document) != self.identity(document):
            part = bisect.bisect_right(self.parts, document) - 1
            path = self.directory / f'{part:05}.tokens'
            raise damaged(path, f'document {document} is not as it was written')

    def checksum(self, document: int) -> int:
        """The identity that follows from what is on disk."""
        return identity_of(self[document])

    @staticmethod
    def gathered(tasks: Sequence[Part], directory: Path) -> dict[str, Any]:
        """Further facts of all parts, of which the files are in `directory`."""
        return {}

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Tokens before each document, and in all: int64 [D + 1], on disk."""
        path = self.directory / _OFFSETS
        offsets = mapped(path, 'int64', (len(self) + 1,))
        if (offsets[0], offsets[-1]) != (0, self.tokens):
            raise damaged(path, f'it tells of {offsets[-1]} tokens, and not {self.tokens}')
        return offsets

    def length(self, document: int) -> int:
        """Tokens of a document."""
        return int(self.offsets[document + 1] - self.offsets[document])

    def identity(self, document: int) -> int:
        """A number in [0, 2^31) that equal documents share, and hardly any others."""
        return int(self._identities[document])

    @functools.cached_property
    def _identities(self) -> np.ndarray:
        return mapped(self.directory / _IDENTITIES, 'int32', (len(self),))

    @functools.cached_property
    def _opened(self) -> Callable[[Path, str, tuple[int, ...]], np.ndarray]:
        return functools.lru_cache(_MOST_OPEN)(mapped)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def tokenised(
    corpus: Corpus, tokenizer: Tokenizer, processes: int | None = None
) -> tuple[Texts, ...]:
    """The sources of a corpus as token ids; those that are not there yet are made first, by one
    process for each core where `processes` says nothing else."""
    return tuple(
        kept(
            documents,
            f'{_VERSION} {documents.digest} {tokenizer.digest}',
            functools.partial(Part, documents, tokenizer),
            Texts,
            processes,
        )
        for documents in corpus.sources
    )


def kept(
    documents: Documents,
    identity: str,
    part: Callable[[Path, range], Part],
    kind: type[Kept],
    processes: int | None,
) -> Kept:
    """What the parts make of all documents, kept on disk under a hash of `identity`."""
    digest = hashlib.sha256(identity.encode()).hexdigest()
    directory = cache_dir() / 'tokens' / digest[:32]
    if not directory.exists():
        try:
            with locked(directory.with_name(f'{directory.name}.lock')):
                if not directory.exists():
                    _make(documents, part, kind, directory, processes)
        except OSError as error:
            raise UserError(
                f'cannot keep the tokens of {documents.name} in {directory.parent} '
                f'({error.strerror}): make room there or set LLAMA_JAX_CACHE to another directory'
            ) from error
    try:
        facts = json.loads((directory / _FACTS).read_text())
        facts['parts'] = tuple(facts['parts'])
        texts = kind(documents.name, directory, digest, **facts)
        if len(texts) != len(documents):
            raise ValueError(f'{len(texts)} documents, and not {len(documents)}')
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(directory / _FACTS, str(error)) from error
    return texts


def _make(
    documents: Documents,
    part: Callable[[Path, range], Part],
    kind: type[Texts],
    directory: Path,
    processes: int | None,
) -> None:
    """Make the parts that no killed start has left behind; then the directory is there."""
    partial = directory.with_name(f'{directory.name}.partial')
    partial.mkdir(parents=True, exist_ok=True)
    n = max(1, min(_MOST_PARTS, len(documents), -(-documents.bytes // _PART_BYTES)))
    parts = [i * len(documents) // n for i in range(n + 1)]
    tasks = [part(partial / f'{i:05}', range(parts[i], parts[i + 1])) for i in range(n)]
    missing = [task for task in tasks if not task.finished]
    left = documents.bytes * len(missing) // n
    if processes is None:
        processes = workers.cores() if left > _FEW_BYTES else 0
    done = documents.bytes - left
    with Progress(f'tokenising {documents.name}', documents.bytes, done) as progress:
        for _ in workers.run(missing, processes, progress.add, _REMEDY):
            pass
    count = size = 0
    with (partial / _OFFSETS).open('wb') as offsets, (partial / _IDENTITIES).open('wb') as ids:
        offsets.write(np.zeros(1, np.int64).tobytes())
        for task in tasks:
            lengths_D, identities_D, bytes_D = np.load(task.index).T
            offsets.write((count + np.cumsum(lengths_D)).tobytes())
            ids.write(identities_D.astype(np.int32).tobytes())
            count, size = count + int(lengths_D.sum()), size + int(bytes_D.sum())
    facts = {'parts': parts, 'tokens': count, 'bytes': size, 'dtype': tasks[0].dtype}
    facts |= kind.gathered(tasks, partial)
    (partial / _FACTS).write_text(json.dumps(facts))
    for task in tasks:
        task.index.unlink()
    os.rename(partial, directory)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some documents of a source, to be tokenised by one process."""

    documents: Documents
    tokenizer: Tokenizer
    path: Path
    numbers: range

    @property
    def dtype(self) -> str:
        return 'uint16' if self.tokenizer.vocab_size <= 2**16 else 'int32'

    @property
    def index(self) -> Path:
        """Length, identity and bytes of each document. It is written last."""
        return self.path.with_suffix('.index.npy')

    @property
    def finished(self) -> bool:
        return self.index.exists()

    def run(self, seen: Callable[[int], None]) -> None:
        """Tokenise the documents one after another; `seen` is told the UTF-8 bytes of each."""
        rows = np.zeros((len(self.numbers), 3), np.int64)
        with self.path.with_suffix('.tokens').open('wb') as file:
            for row, number in zip(rows, self.numbers, strict=True):
                text = self.documents[number]
                ids = self.tokenizer.encode(text)
                file.write(ids.astype(self.dtype).tobytes())
                row[:] = len(ids), identity_of(ids), len(text.encode())
                seen(int(row[2]))
        self.finish(rows)

    def finish(self, rows: np.ndarray) -> None:
        """Write the index [n, 3]."""
        partial = self.path.with_suffix('.partial.npy')
        np.save(partial, rows)
        partial.replace(self.index)


Kept = TypeVar('Kept', bound=Texts)


def mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array that stays on disk. Raises UserError where it is not whole."""
    kind = np.dtype(dtype)
    size = math.prod(shape)
    try:
        found = path.stat().st_size
        if found != size * kind.itemsize:
            raise ValueError(f'{found:,} bytes, and not {size * kind.itemsize:,}')
        return np.memmap(path, kind, 'r', shape=shape) if size else np.zeros(shape, kind)
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> UserError:
    return UserError(
        f'{path} is damaged ({why}): delete {path.parent}; the same command tokenises anew'
    )

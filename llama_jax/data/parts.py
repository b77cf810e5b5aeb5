"""Dividing files into parts of equal work, and writing the documents of one part.

The division depends on the files alone, so the order of documents does not depend on how many
processes write them.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from llama_jax.data import formats, splits
from llama_jax.data.contents import CHUNK, Content
from llama_jax.data.text_files import File, Reading, Span, documents
from llama_jax.data.write import Shard, ShardWriter, example

_MOST_PARTS = 256  # a reader keeps a file of each part and split open
_SEARCH = 1 << 16
_NO_LINE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """Spans of files whose documents go into one shard of each split."""

    number: int
    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        """How much there is to read."""
        ends = (span.file.size if span.stop is None else span.stop for span in self.spans)
        return sum(end - span.start for end, span in zip(ends, self.spans, strict=True))


@dataclasses.dataclass(frozen=True)
class Written:
    """What writing a part gave."""

    shards: dict[str, Shard]  # by split; splits without documents are not there
    first_positions: dict[str, tuple[float, ...]]  # by split, the three smallest different ones
    empty: tuple[str, ...]  # names of the spans without a document


def divide(files: Sequence[File], contents: Sequence[Content], how: Reading) -> list[Part]:
    """At most about 256 parts of 32 MiB or more each, in the order of the files.

    Plain text and lines of JSON are divided where a line ends; anything else stays whole.
    """
    total = sum(file.size for file in files)
    size = CHUNK * max(1, -(-total // (CHUNK * _MOST_PARTS)))
    parts: list[Part] = []
    pending: list[Span] = []
    held = 0
    for file, content in zip(files, contents, strict=True):
        for span in _spans(file, content, size, how.encoding):
            part = Part(0, (span,))
            pending.append(span)
            held += part.bytes
            if held >= size // 2:
                parts.append(Part(len(parts), tuple(pending)))
                pending, held = [], 0
    if pending:
        parts.append(Part(len(parts), tuple(pending)))
    return parts


def _spans(file: File, content: Content, size: int, encoding: str) -> Iterator[Span]:
    divisible = file.format.divisible and formats.line_ends_are_bytes(encoding)
    if not divisible or file.size <= size:
        yield Span(file)
        return
    bounds = [(0, 1)]
    with formats.reading(file.path), file.path.open('rb') as stream:
        for nominal in range(size, file.size, size):
            if nominal <= bounds[-1][0]:
                continue  # a line so long that it took this bound too
            found = _bound(stream, nominal, file.format.structure == 'lines', encoding)
            if found is not None and found[0] < file.size:
                before = sum(content.line_ends[: nominal // CHUNK])
                bounds.append((found[0], 1 + before + found[1]))
    for (start, line), (stop, _) in itertools.pairwise([*bounds, (file.size, 0)]):
        yield Span(file, start, stop, line)


def _bound(stream: BinaryIO, nominal: int, lines: bool, encoding: str) -> tuple[int, int] | None:
    """Where to divide at `nominal` or soon after, and how many line ends are between the two."""
    stream.seek(nominal)
    window = stream.read(_SEARCH)
    if not lines and (at := window.find(b'\n\n')) >= 0:
        return nominal + at + 2, window.count(b'\n', 0, at + 2)
    at, searched = window.find(b'\n'), 0
    while at < 0 and window and (lines or searched < _NO_LINE):
        searched += len(window)
        window = stream.read(_SEARCH)
        at = window.find(b'\n')
    if at >= 0:
        return nominal + searched + at + 1, 1
    if lines or formats.is_multibyte(encoding):
        return None  # the next bound, or the end of the file
    stream.seek(nominal)
    head = stream.read(4)
    inside = itertools.takewhile(lambda byte: byte & 0xC0 == 0x80, head)
    return nominal + (len(list(inside)) if encoding == 'utf-8' else 0), 0


@dataclasses.dataclass(frozen=True)
class Job:
    """Writing one part into a directory. `moved` says which splits as a whole, and which positions,
    go into another split than by their hash."""

    part: Part
    how: Reading
    directory: Path
    moved: dict[float | str, str]

    @property
    def note(self) -> Path:
        """The file that says that the part is complete."""
        return self.directory / f'part-{self.part.number:05d}.json'

    def written(self) -> Written | None:
        """What an earlier run wrote, or None where the part is not complete."""
        try:
            facts = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return None
        shards = {split: Shard(*shard) for split, shard in facts['shards'].items()}
        positions = {split: tuple(first) for split, first in facts['first_positions'].items()}
        return Written(shards, positions, tuple(facts['empty']))

    def run(self, seen: formats.Seen) -> Written:
        """Writes the part, whole or not at all."""
        writers: dict[str, ShardWriter] = {}
        first: dict[str, list[float]] = {}
        empty, unreleased = [], 0
        for span in self.part.spans:
            count = 0
            for text, origin in documents(span, self.how, seen):
                count += 1
                content = text.encode()
                position = splits.position(content)
                split = splits.by_position(position)
                split = self.moved.get(position) or self.moved.get(split, split)
                _keep_smallest(first.setdefault(split, []), position)
                if split not in writers:
                    writers[split] = ShardWriter(
                        self.directory / f'part-{self.part.number:05d}-{split}'
                    )
                named = origin.encode('utf-8', 'backslashreplace')  # of a name that is no UTF-8
                writers[split].write(example({'text': content, 'origin': named}))
                unreleased += len(content)
                if unreleased > CHUNK:
                    _release_memory()
                    unreleased = 0
            if not count:
                empty.append(span.file.name)
        shards = {}
        for split, writer in writers.items():
            writer.close()
            shards[split] = Shard(writer.path.name, writer.records, writer.bytes)
        positions = {split: tuple(smallest) for split, smallest in first.items()}
        written = Written(shards, positions, tuple(empty))
        partial = self.note.with_suffix('.partial')
        partial.write_text(json.dumps(dataclasses.asdict(written)))
        os.replace(partial, self.note)
        _release_memory()
        return written


def _release_memory() -> None:
    """Gives back what the C library holds: texts of all sizes leave holes in its heap, more with
    every part."""
    with contextlib.suppress(AttributeError):  # of a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _keep_smallest(first: list[float], position: float, most: int = 3) -> None:
    """Keeps the smallest different positions, in order."""
    if len(first) == most and position >= first[-1]:
        return
    at = bisect.bisect_left(first, position)
    if at == len(first) or first[at] != position:
        first.insert(at, position)
        del first[most:]

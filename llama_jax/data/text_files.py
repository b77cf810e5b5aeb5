"""Local text of any kind as documents: which files, and what each of them holds.

Documents have a `text` and an `origin` (file and line). Lines of JSON, elements of JSON arrays,
rows of Parquet and of tables (.csv) are documents; any other file is text, cut into documents at
blank lines, else at line ends, else between words. Text is kept exactly as it stands, line ends
included.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.data import find, formats, record_files
from llama_jax.errors import UserError

if TYPE_CHECKING:
    from llama_jax.data.config import Source

RECORDS = 'records'
"""Name of the source that yields the records of files, each as a whole."""
_MOST_CHARACTERS = 1 << 19  # a context of 128k tokens
_LEAST_CHARACTERS = 1 << 10
_PAGE = 1 << 14
_BYTES = 3  # a character's, at most in most scripts, so that Chinese has enough documents too

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a source."""

    path: Path
    name: str
    size: int
    format: formats.Format


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the files of a source are read."""

    field: str | None  # None: the record as a whole, as JSON
    encoding: str
    characters: int  # of a document, at most


@dataclasses.dataclass(frozen=True)
class Span:
    """A file, or a range of its bytes that begins and ends where a line does."""

    file: File
    start: int = 0
    stop: int | None = None
    line: int = 1  # the number of the first line


def files_of(source: Source) -> tuple[list[File], Reading]:
    """The files of a source, and how to read them.

    Raises UserError for patterns without a match, files that are no text, and settings that are
    wrong or without effect. In a directory, files that are no text are left out.
    """
    encoding = formats.check_encoding(source.encoding)
    files, binary, tables, beside = [], [], [], set[Path]()
    for path, name, of_directory in find.matching(source.files, source.exclude):
        if of_directory and formats.is_binary(path, encoding):
            binary.append(name)
            continue
        with formats.reading(path):
            size = path.stat().st_size
        found = formats.recognise(path, encoding)
        if found.structure == 'table' and source.name != RECORDS:
            names = _columns(path, found, encoding)
            if source.field not in names:
                found = dataclasses.replace(found, structure='text')
                tables.append((path, ', '.join(names)))
        files.append(File(path, name, size, found))
        if of_directory:
            beside.add(path)
    if binary:
        _tell_left_out(source, len(binary), binary[0])
    if tables:
        _tell_tables(source.field, len(tables), *tables[0])
    if not files:
        raise UserError(f'there is no text in {", ".join(source.files)}: all files are binary')
    if source.name == RECORDS:
        return _of_records(source, files, beside), Reading(None, encoding, 0)
    if source.field != 'text' and all(file.format.structure == 'text' for file in files):
        raise UserError(
            f'field {source.field!r} has no effect: {", ".join(source.files)} is plain text, which '
            'has no fields; leave it out'
        )
    return files, Reading(source.field, encoding, _characters(source, files))


def _columns(path: Path, found: formats.Format, encoding: str) -> list[str]:
    content = formats.blocks(path, found.compression)
    return record_files.columns(formats.decoded(content, encoding, path))


@functools.cache  # a run looks at its files several times
def _tell_tables(field: str, count: int, first: Path, names: str) -> None:
    log.warning(
        '%d files of tables have no column %r and are read as plain text, such as %s (columns: '
        '%.200s): to read a column, set the field of the source (%s)',
        *(count, field, first, names, formats.option('field')),
    )


def _of_records(source: Source, files: list[File], beside: set[Path]) -> list[File]:
    """The files that hold records. Of a directory, a README and the like are left out."""
    others = [file for file in files if file.format.structure == 'text']
    if any(file.format.structure not in ('text', 'table') for file in files):
        # A table that lies beside records is about them.
        tables = (file for file in files if file.format.structure == 'table')
        others += [file for file in tables if file.path in beside]
    wrong = [file for file in others if file.path not in beside]
    if wrong or len(others) == len(files):
        raise UserError(
            f'{str((wrong or others)[0].path)!r} holds no records: give .jsonl, .json, .csv or '
            '.parquet files (.gz, .zst, .xz or .bz2 of them work too), or rename it after what it '
            'is'
        )
    if others:
        _tell_left_out(source, len(others), others[0].name, 'hold no records')
    return [file for file in files if file not in others]


@functools.cache  # a run looks at its files several times
def _tell_left_out(source: Source, count: int, first: str, why: str = 'are no text') -> None:
    log.warning('%d files %s and are left out, such as %s', count, why, first)


def _characters(source: Source, files: list[File]) -> int:
    """The longest document: as set, or so that few large files still give documents to hold out.

    That is 524,288 characters; less where plain text would be cut into fewer than 100 documents,
    though not below 16,384 for this; and again less where it would be fewer than 10.
    """
    if source.document_characters is not None:
        if not 1 <= source.document_characters <= 16 * _MOST_CHARACTERS:
            raise UserError(
                f'document_characters is {source.document_characters}: set it between 1 and '
                f'{16 * _MOST_CHARACTERS} (a document is read as a whole)'
            )
        return source.document_characters
    sizes = [file.size for file in files]
    most = _MOST_CHARACTERS
    if any(file.format.structure != 'text' for file in files):
        return most
    for wanted, least in ((100, _PAGE), (10, _LEAST_CHARACTERS)):
        while most > least and sum(-(-size // (_BYTES * most)) for size in sizes) < wanted:
            most //= 2
    return most


def documents(
    span: Span, how: Reading, seen: formats.Seen = lambda count: None
) -> Iterator[tuple[str, str]]:
    """(text, origin) of every document of a span; those of white space only are left out.

    `seen` is told how many bytes of the stored file were read. Raises UserError naming the file
    that cannot be read as what it is.
    """
    for text, line in _texts(span, how, seen):
        if text and not text.isspace():
            yield text, f'{span.file.name}:{line}'


def whole_records(source: Source, origins: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The records of a source of texts that have these origins, with all of their fields: of JSON
    and of Parquet, which are read up to the last of them. A file of text has no fields."""
    left: dict[str, set[str]] = {}
    for origin in origins:
        left.setdefault(origin.rpartition(':')[0], set()).add(origin)
    files, how = files_of(source)
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        wanted = left.get(file.name, set())
        if file.format.structure == 'text' or not wanted:
            continue
        with contextlib.suppress(UserError):  # of what is no object: it has no fields
            for text, origin in documents(Span(file), dataclasses.replace(how, field=None)):
                if origin in wanted:
                    found[origin] = json.loads(text)
                    wanted.remove(origin)
                    if not wanted:
                        break
    return found


@functools.lru_cache(maxsize=64)  # the parts of a suite ask one after another
def fields_of(source: Source) -> frozenset[str]:
    """The names of the fields of the first record of a source of texts: one file is read."""
    files, how = files_of(source)
    first = next((file for file in files if file.format.structure != 'text'), None)
    if first is not None:
        with contextlib.suppress(UserError):
            found = documents(Span(first), dataclasses.replace(how, field=None))
            return frozenset(*(json.loads(text) for text, _ in itertools.islice(found, 1)))
    return frozenset()


def _texts(span: Span, how: Reading, seen: formats.Seen) -> Iterator[record_files.Numbered]:
    path, kind = span.file.path, span.file.format
    content = formats.blocks(path, kind.compression, span.start, span.stop, seen)
    if kind.structure == 'text':
        text = formats.decoded(content, how.encoding, path, span.start)
        yield from _pieces(text, how.characters, span.line)
        return
    if kind.structure == 'parquet':
        if kind.compression:
            raise UserError(f'{str(path)!r} is compressed Parquet: decompress it first')
        found = record_files.from_parquet(path, field=how.field, seen=seen)
    elif kind.structure in ('json', 'table'):
        text = formats.decoded(content, how.encoding, path)
        read = record_files.from_json if kind.structure == 'json' else record_files.from_table
        found = read(text, path, field=how.field)
    else:
        lines = _lines(content, span, how.encoding)
        found = record_files.from_lines(
            lines, path, field=how.field, encoding=how.encoding, first=span.line
        )
    for long, number in found:
        for piece in [long] if how.field is None else cut(long, how.characters):
            yield piece, number


def _lines(content: Iterator[bytes], span: Span, encoding: str) -> Iterator[bytes | str]:
    if not formats.line_ends_are_bytes(encoding):
        return record_files.split_lines(formats.decoded(content, encoding, span.file.path), '\n')
    first = next(content, b'') if span.start == 0 else b''
    if wide := formats.wide_encoding(first):
        raise UserError(
            f'{str(span.file.path)!r} looks like {wide.upper()}: set the encoding of its source '
            f'({formats.option("encoding")}) to {wide}'
        )
    first = first.removeprefix(codecs.BOM_UTF8)
    return record_files.split_lines(itertools.chain([first], content), b'\n')


def _pieces(content: Iterator[str], most: int, line: int) -> Iterator[record_files.Numbered]:
    """(text, line) of the pieces of a text that comes in blocks; joined they are the text."""
    held: list[str] = []
    length = 0
    for block in content:
        held.append(block)
        length += len(block)
        if length > 2 * most:
            *whole, rest = cut(''.join(held), most)
            for piece in whole:
                yield piece, line
                line += piece.count('\n')
            held, length = [rest], len(rest)
    for piece in cut(''.join(held), most):
        yield piece, line
        line += piece.count('\n')


def cut(text: str, most: int) -> list[str]:
    """Pieces of at most `most` characters, cut after a blank line, else a line, else a space, else
    anywhere; in linear time."""
    pieces, start = [], 0
    while len(text) - start > most:
        middle, limit = start + max(most // 2, 1), start + most
        end = limit
        for marks in (('\n\n', '\n\r\n'), ('\n',), (' ',)):
            places = [(text.rfind(mark, start, limit), len(mark)) for mark in marks]
            ends = [at + length for at, length in places if 0 <= at >= middle - length]
            if ends:
                end = max(ends)
                break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if start < len(text) else pieces

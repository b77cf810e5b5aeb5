"""Files of records: JSON lines, JSON arrays, Parquet, tables of text (.csv). Of each record one
field is read, which is a text, or all of it, as JSON."""

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.data.formats import Seen, option, reading
from llama_jax.errors import UserError

Numbered = tuple[str, int]  # a text (or JSON), and the number of its line or record, from 1

_MOST_BAD = 10
_MOST_CHARACTERS = 1 << 30  # of a record in JSON, which has to fit in memory several times
_LOOKED_AT = 1000
"""Lines of a table that tell how it is written."""
_SPACE = re.compile(r'[ \t\r\n]*')


class BadRecords:
    """Collects what is wrong with the records of a file, to be said all at once."""

    def __init__(self, path: Path, unit: str, field: str | None) -> None:
        self._path, self._unit, self._field, self._said = path, unit, field, list[str]()

    def text(self, value: Any, number: int) -> str | None:
        """The text of one record, an object with the field or a string by itself; without a field
        all of an object, as JSON. None where it has none (which is then noted)."""
        if self._field is None:
            value = _named(value)
            if isinstance(value, dict):
                # Names stay in their order, for that of tools and of arguments is read by models.
                return _unicode(json.dumps(value, ensure_ascii=False, separators=(',', ':')))
            self.note(number, f'is no object ({type(value).__name__})')
            return None
        text = value.get(self._field) if isinstance(value, dict) else value
        if not isinstance(text, str):
            there = ', '.join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            self.note(number, f'has no text in the field {self._field!r} (there: {there[:200]})')
            return None
        return _unicode(text)

    def note(self, number: int, problem: str) -> None:
        """Adds a problem; raises once there are ten."""
        self._said.append(f'{self._unit} {number} {problem}')
        if len(self._said) == _MOST_BAD:
            self.check(more=' and maybe more')

    def check(self, more: str = '') -> None:
        """Raises UserError where something was noted."""
        if self._said:
            other = f', or set the field of the source ({option("field")})' if self._field else ''
            raise UserError(
                f'{str(self._path)!r}, {"; ".join(self._said)}{more}: mend or remove these{other}'
            )


def _named(value: Any) -> Any:
    """A list of two texts or more, as sentence-transformers publishes pairs and triplets, by the
    names that these have there."""
    if not isinstance(value, list) or len(value) < 2:
        return value
    if not all(isinstance(text, str) for text in value):
        return value
    names = ['anchor', 'positive', *(f'negative_{n}' for n in range(1, len(value) - 1))]
    return dict(zip(names, value, strict=True))


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
        return re.sub('[\ud800-\udfff]', '\ufffd', text)
    return text


def from_lines(
    lines: Iterator[bytes | str], path: Path, *, field: str | None, encoding: str, first: int
) -> Iterator[Numbered]:
    """The text of every line that is not empty; the first has the number `first`.

    Raises UserError for the first ten lines that hold none.
    """
    bad = BadRecords(path, 'line', field)
    for number, line in enumerate(lines, start=first):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line if isinstance(line, str) else line.decode(encoding))
        except UnicodeDecodeError as error:
            bad.note(number, f'is no {encoding.upper()} text (its byte {error.start})')
        except ValueError as error:
            bad.note(number, f'is no JSON ({error})')
        except RecursionError:
            bad.note(number, 'is JSON nested too deeply')
        else:
            if (text := bad.text(value, number)) is not None:
                yield text, number
    bad.check()


def split_lines(content: Iterator[Any], end: Any) -> Iterator[Any]:
    """Lines without their ends, of blocks of bytes or of text. A line may span many blocks."""
    begun = []
    for block in content:
        if end not in block:
            begun.append(block)
            continue
        first, *lines, rest = block.split(end)
        yield type(block)().join([*begun, first])
        yield from lines
        begun = [rest]
    if begun and (last := type(begun[0])().join(begun)):
        yield last


def from_json(content: Iterator[str], path: Path, *, field: str | None) -> Iterator[Numbered]:
    """The text of every object of an array, or of objects one after another, read piece by piece.

    Raises UserError for the first ten records that hold none, and where the JSON breaks off.
    """
    bad = BadRecords(path, 'record', field)
    for number, value in enumerate(_values(content, path), start=1):
        if (text := bad.text(value, number)) is not None:
            yield text, number
    bad.check()


def _values(content: Iterator[str], path: Path) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    buffer, at, count = '', 0, 0
    is_array: bool | None = None
    # In an array: whether a value may come, and whether it may end.
    value_next, end_next, ended = True, True, False

    def broken(problem: object) -> UserError:
        return UserError(f'{str(path)!r} is no JSON after {count} records ({problem})')

    while True:
        at = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]  # it always matches
        if at == len(buffer):
            buffer, at = next(content, ''), 0
            if not buffer:
                break
            continue
        character = buffer[at]
        if ended:
            raise broken('something follows the array')
        if is_array is None:
            is_array = character == '['
            at += is_array
        elif is_array and character == ']' and end_next:
            ended, at = True, at + 1
        elif is_array and not value_next:
            if character != ',':
                raise broken(f'a comma is missing before {character!r}')
            value_next, end_next, at = True, False, at + 1
        else:
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                # Far from the end of what was read, the fault is none of reading too little.
                unfinished = error.msg.startswith('Unterminated') or error.pos > len(buffer) - 16
                if len(buffer) - at > _MOST_CHARACTERS:
                    raise broken('one of more than 2**30 characters follows') from None
                more = _as_much_again(content, len(buffer) - at) if unfinished else ''
                if not more:
                    raise broken(error.msg) from None
                buffer, at = buffer[at:] + more, 0
                continue
            except (ValueError, RecursionError) as error:
                raise broken(error) from None
            count, at = count + 1, end
            value_next, end_next = not is_array, True
            yield value
    if is_array and not ended:
        raise broken('the array does not end')


def _as_much_again(content: Iterator[str], length: int) -> str:
    """The next texts, at least `length` characters: so a long value is read in linear time."""
    parts, got = [], 0
    while got < max(length, 1) and (part := next(content, '')):
        parts.append(part)
        got += len(part)
    return ''.join(parts)


def columns(content: Iterator[str]) -> list[str]:
    """The names in the first line of a table; none where it is no table."""
    try:
        return _rows(_with_ends(content))[0]
    except csv.Error:
        return []


def from_table(content: Iterator[str], path: Path, *, field: str | None) -> Iterator[Numbered]:
    """The text of every row below the first, which names the columns; a cell in quotes may hold
    line ends (RFC 4180). Cells are separated by commas, semicolons or tabs, by which the first line
    has most; between tabs a quote is a letter where the first lines do not close each, as in many
    dumps. The number is that of the row's last line.

    Raises UserError for columns of one name, for the first ten rows without the text, and for
    quotes that do not close.
    """
    bad = BadRecords(path, 'line', field)
    csv.field_size_limit(_MOST_CHARACTERS)
    line = 1
    try:
        names, rows = _rows(_with_ends(content))
        if len(set(names)) < len(names):
            raise UserError(f'{str(path)!r} names a column twice ({", ".join(names)}): rename one')
        for row in rows:
            line = rows.line_num
            more = row[len(names) :]
            if any(more):
                bad.note(line, f'has more cells than the first line names ({len(names)})')
            elif row and (text := bad.text(dict(zip(names, row, strict=False)), line)) is not None:
                yield text, line
    except csv.Error as error:
        raise UserError(
            f'{str(path)!r}, what follows line {line} is no row of a table ({error}): mend it, or '
            'rename the file to .txt to read it as text'
        ) from None
    bad.check()


def _with_ends(content: Iterator[str]) -> Iterator[str]:
    """Lines with their ends."""
    return (f'{line}\n' for line in split_lines(content, '\n'))


def _rows(lines: Iterator[str]) -> tuple[list[str], Any]:
    """The names of the columns, and a reader of the rows below, which knows its `line_num`."""
    head = list(itertools.islice(lines, _LOOKED_AT))

    def reader(lines: Iterable[str], delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> Any:
        how: Any = {'delimiter': delimiter, 'quoting': quoting}
        return csv.reader(lines, strict=True, **how)

    def n_columns(delimiter: str) -> int:
        try:
            return len(next(reader(head[:1], delimiter), []))
        except csv.Error:
            return 0

    delimiter, quoting = max(',;\t', key=n_columns), csv.QUOTE_MINIMAL
    try:
        for _ in reader(head, delimiter) if delimiter == '\t' else ():
            pass
    except csv.Error as error:
        if len(head) < _LOOKED_AT or 'end of data' not in str(error):
            quoting = csv.QUOTE_NONE
    rows = reader(itertools.chain(head, lines), delimiter, quoting)
    return [name.strip() for name in next(rows, [])], rows


def from_parquet(path: Path, *, field: str | None, seen: Seen) -> Iterator[Numbered]:
    """The texts of one column, or all columns. Raises UserError for a damaged file and rows without
    a text."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{str(path)!r} is Parquet: `pip install pyarrow` reads it') from None
    bad = BadRecords(path, 'row', field)
    try:
        with reading(path), pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field is not None and field not in names:
                raise UserError(
                    f'{str(path)!r} has no column {field!r} (there: {", ".join(names)}): set the '
                    f'field of the source ({option("field")})'
                )
            rows = file.metadata.num_rows
            size, number, told = path.stat().st_size, 0, 0
            columns = None if field is None else [field]
            for batch in file.iter_batches(batch_size=256, columns=columns, use_threads=False):
                for value in batch.to_pylist():
                    number += 1
                    if field is None:
                        value = {name: of_columns(x) for name, x in value.items() if x is not None}
                    if (text := bad.text(value, number)) is not None:
                        yield text, number
                read = size * number // max(rows, 1)
                seen(read - told)
                told = read
    except pyarrow.ArrowException as error:
        raise UserError(f'cannot read {str(path)!r} ({error}): give a whole file') from error
    bad.check()


def of_columns(value: Any) -> Any:
    """A value of a column as JSON knows them. Fields that a struct leaves out are left out: in
    columns every message has the fields of all."""
    if isinstance(value, dict):
        return {name: of_columns(x) for name, x in value.items() if x is not None}
    if isinstance(value, list | tuple):
        return [of_columns(x) for x in value]
    if isinstance(value, bytes):
        return value.decode('utf-8', 'replace')
    return value if isinstance(value, str | int | float | None) else str(value)

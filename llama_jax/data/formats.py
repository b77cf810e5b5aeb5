"""What a file of text is, and its bytes: formats are told by content, compression is undone."""

import bz2
import codecs
import contextlib
import dataclasses
import gzip
import importlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from llama_jax.errors import UserError

Structure = Literal['text', 'lines', 'json', 'parquet', 'table']
Seen = Callable[[int], None]  # is told how many bytes of the stored file were read

BLOCK = 1 << 20
_MAGIC = {
    b'\x1f\x8b': 'gzip',
    **{b'BZh%d1AY&SY' % level: 'bz2' for level in range(1, 10)},
    **{b'BZh%d\x17rE8P\x90' % level: 'bz2' for level in range(1, 10)},  # of nothing
    b'\xfd7zXZ\0': 'xz',
    b'\x28\xb5\x2f\xfd': 'zstd',
}
_SUFFIXES = {'.gz': 'gzip', '.bz2': 'bz2', '.xz': 'xz', '.zst': 'zstd', '.zstd': 'zstd'}
_STRUCTURES: dict[str, Structure] = {
    **{'.jsonl': 'lines', '.ndjson': 'lines', '.json': 'json', '.parquet': 'parquet'},
    **{'.csv': 'table', '.tsv': 'table'},
}
_REFUSED = {
    b'PK\x03\x04': 'a zip archive: unpack it first',
    b'%PDF-': 'a PDF: extract its text first, e.g. with `pdftotext`',
    b'version https://git-lfs': 'a git-lfs pointer: fetch the file itself with `git lfs pull`',
}
# In text of these encodings the byte 10 is a line end and nothing else.
_LINE_ENDS_AS_BYTES = (
    *('utf-8', 'ascii', 'iso8859', 'cp125', 'cp85', 'cp86', 'koi8', 'mac-', 'tis-620'),
    *('gb', 'big5', 'euc', 'shift-jis', 'cp93', 'cp94', 'cp95', 'johab'),
)
_MULTIBYTE = ('gb', 'big5', 'euc', 'shift-jis', 'cp93', 'cp94', 'cp95', 'johab')


def option(setting: str) -> str:
    """The options that change a setting of a source: who reads a file knows not of which source."""
    return f'--data.sources.N.{setting} or --data.validation.N.{setting}, N from 0'


@dataclasses.dataclass(frozen=True)
class Format:
    """How a file is read."""

    structure: Structure
    compression: str | None = None  # gzip, bz2, xz, zstd

    @property
    def divisible(self) -> bool:
        """Whether a range of its bytes can be read without those before."""
        return self.compression is None and self.structure in ('text', 'lines')


def recognise(path: Path, encoding: str) -> Format:
    """The format of a file, by its first bytes; its name decides between JSON and other text.

    Raises UserError for archives, for git-lfs pointers, and where name and content disagree.
    """
    with reading(path), path.open('rb') as file:
        head = file.read(32)
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise UserError(f'{str(path)!r} is {what}')
    compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and (named := _SUFFIXES.get(suffixes[-1])):
        if compression != named and head:
            raise UserError(
                f'{str(path)!r} is no {named} file (it begins with {head[:4]!r}): fetch it again, '
                'or rename it after what it is'
            )
        suffixes.pop()
    structure = _STRUCTURES.get(suffixes[-1], 'text') if suffixes else 'text'
    if head.startswith(b'PAR1'):
        structure = 'parquet'
    elif structure == 'parquet' and head:
        raise UserError(f'{str(path)!r} is no Parquet file (it begins with {head[:4]!r})')
    if structure == 'json' and _holds_lines(path, compression, encoding):
        structure = 'lines'
    return Format(structure, compression)


def is_binary(path: Path, encoding: str) -> bool:
    """Whether a file is plainly no text: an archive, a picture, a program."""
    with reading(path), path.open('rb') as file:
        head = file.read(4096)
    if head.startswith(b'PAR1'):
        return False
    if head.startswith((b'PK\x03\x04', b'%PDF-')):
        return True
    compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if compression:
        head = next(blocks(path, compression), b'')[:4096]
    return b'\0' in head and line_ends_are_bytes(encoding) and wide_encoding(head) is None


def _holds_lines(path: Path, compression: str | None, encoding: str) -> bool:
    """Whether the first line is an object by itself."""
    if not line_ends_are_bytes(encoding):
        return False
    first = next(blocks(path, compression), b'').lstrip(b'\xef\xbb\xbf \t\r\n')
    line, end, _ = first.partition(b'\n')
    try:
        return bool(end) and isinstance(json.loads(line.decode(encoding)), dict)
    except (ValueError, RecursionError):
        return False


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what damaged files and disks raise into a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        if type(error).__name__ != 'ZstdError':  # of a package that need not be there
            raise
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, 'strerror', None) or str(error)
    return UserError(f'cannot read {str(path)!r} ({reason}): give a whole file that you may read')


def blocks(
    path: Path,
    compression: str | None,
    start: int = 0,
    stop: int | None = None,
    seen: Seen = lambda count: None,
) -> Iterator[bytes]:
    """The content in blocks of about 1 MiB. `start` and `stop` are for files as they are stored.

    Raises UserError where the file cannot be read or is damaged, be it in its midst.
    """
    with reading(path), path.open('rb') as raw:
        raw.seek(start)
        stream = _decompressed(raw, compression) if compression else raw
        left, told = stop - start if stop is not None else None, start
        while block := stream.read(BLOCK if left is None else min(BLOCK, left)):
            if left is not None:
                left -= len(block)
            at = raw.tell()
            seen(at - told)
            told = at
            yield block


def _decompressed(raw: BinaryIO, compression: str) -> Any:
    if compression == 'gzip':
        return gzip.GzipFile(fileobj=raw)
    if compression == 'bz2':
        return bz2.BZ2File(raw)
    if compression == 'xz':
        return lzma.LZMAFile(raw)
    try:
        return importlib.import_module('compression.zstd').ZstdFile(raw)  # Python 3.14
    except ImportError:
        return _Zstandard(raw)


class _Zstandard:
    """Decompression by the package zstandard, whose own reader takes a cut file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise UserError(
                f'{raw.name!r} is compressed by Zstandard: `pip install zstandard` reads it'
            ) from None
        self._raw = raw
        self._new = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._frame: Any = None

    def read(self, size: int) -> bytes:
        """Some bytes, at least one before the end, not to be more than `size` is no promise."""
        while True:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b''
            data = data or self._raw.read(min(size, 1 << 17))
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError('it ends in the midst of a Zstandard frame')
                return b''
            if self._frame is None or self._frame.eof:
                self._frame = self._new()
            if out := self._frame.decompress(data):
                return out


def line_ends_are_bytes(encoding: str) -> bool:
    """Whether a line end is the byte 10 and that byte is nothing else."""
    return _codec(encoding).startswith(_LINE_ENDS_AS_BYTES)


def is_multibyte(encoding: str) -> bool:
    """Whether it takes the text from its beginning on to know where a character begins."""
    return _codec(encoding).startswith(_MULTIBYTE)


def _codec(encoding: str) -> str:
    return codecs.lookup(encoding).name.replace('_', '-')


def check_encoding(encoding: str) -> str:
    """The encoding as Python calls it; 'utf-8' for 'utf-8-sig', whose mark is left out anyway.

    Raises UserError for one that there is not.
    """
    try:
        ''.encode(encoding)
        name = codecs.lookup(encoding).name
    except LookupError:
        raise UserError(
            f'there is no encoding {encoding!r}: set one that Python knows, such as utf-8, '
            'gb18030, big5, shift_jis, latin-1, cp1252 or utf-16'
        ) from None
    return 'utf-8' if name == 'utf-8-sig' else name


def decoded(content: Iterator[bytes], encoding: str, path: Path, start: int = 0) -> Iterator[str]:
    """The text of blocks of bytes that begin at byte `start` of the content.

    Raises UserError that names the byte where it is no text, and the setting to change.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    at, first = start, True
    for block in content:
        if at == 0 and encoding == 'utf-8' and block.startswith(codecs.BOM_UTF8):
            block, at = block[3:], 3
        text = _decode(decoder, block, at, first, path, encoding, final=False)
        at, first = at + len(block), False
        if text:
            yield text
    _decode(decoder, b'', at, first, path, encoding, final=True)


def _decode(
    decoder: codecs.IncrementalDecoder,
    block: bytes,
    at: int,
    first: bool,
    path: Path,
    encoding: str,
    *,
    final: bool,
) -> str:
    kept = len(decoder.getstate()[0])
    try:
        text = decoder.decode(block, final)
    except UnicodeError as error:
        begin = at - kept + (error.start if isinstance(error, UnicodeDecodeError) else 0)
        wide = wide_encoding(block) if first else None
        what = f'{wide.upper()} and ' if wide else ''
        cut = ', which ends within a character: give the whole file, or' if final else ':'
        raise UserError(
            f'{str(path)!r} is {what}no {encoding.upper()} text (byte {begin}){cut} set the '
            f'encoding of its source ({option("encoding")}) to '
            f'{wide or "gb18030, latin-1, utf-16-le or whatever it is"}, or leave the file out '
            '(exclude)'
        ) from None
    if '\0' in text:
        if first and (wide := wide_encoding(block)):
            raise UserError(
                f'{str(path)!r} looks like {wide.upper()}: set the encoding of its source '
                f'({option("encoding")}) to {wide}'
            )
        where = at - kept + len(text[: text.index('\0')].encode(encoding, 'replace'))
        raise UserError(f'{str(path)!r} is binary (a zero byte at {where}): give text files')
    return text


def wide_encoding(head: bytes) -> str | None:
    """utf-16, utf-16-le, ... where the first bytes of a file look like it."""
    for mark, name in (
        *((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32')),
        *((codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16')),
    ):
        if head.startswith(mark):
            return name
    head = head[:4096]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) >= max(2, len(head) // 8) and min(even, odd) <= max(even, odd) // 8:
        name = 'utf-16-be' if even > odd else 'utf-16-le'
        text = head.decode(name, 'replace')
        plain = sum(one.isprintable() or one in '\t\n\r\f' for one in text)
        return name if plain > 0.9 * len(text) else None  # else numbers of some binary format
    return None

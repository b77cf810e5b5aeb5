"""Bible verses by chapter and number, from modules of the SWORD project (zText, one block a book).

A module has three files for each testament: `bzz`, blocks compressed by zlib; `bzs`, where they lie
(offset, size, size of the text: three uint32); `bzv`, an entry for each heading and verse (block,
offset in its text: uint32; size: uint16), in the order of the books.
"""

from __future__ import annotations

import functools
import html
import re
import struct
import zlib
from pathlib import Path

from llama_jax.errors import UserError

Key = tuple[str, int]
"""Chapter, such as 'Gen.1', and number of the verse."""

_CHAPTER = re.compile(r'<chapter[^>]*osisID="([^"]+)"')
_NOTES = re.compile(r'<(note|title)\b.*?</\1>', re.DOTALL)
_TAG = re.compile(r'<[^>]*>')
_BEFORE_MARK = re.compile(r' +([,.;:!?’”)])')


def pairs(root: Path, one: str, other: str) -> list[tuple[Key, str, str]]:
    """The verses that two modules below `root` have both. Raises UserError where one is missing."""
    first, second = verses(root, one), verses(root, other)
    return [(key, text, second[key]) for key, text in first.items() if key in second]


def verses(root: Path, module: str) -> dict[Key, str]:
    """Every verse of a module as plain text, without notes and headings."""
    found: dict[Key, str] = {}
    directories = sorted(path for path in root.rglob(module) if path.is_dir())
    if not directories:
        raise UserError(
            f'there is no module {module} below {root}: unpack the packages sword-text-kjv and '
            'sword-text-web of Debian (`apt-get download`, `dpkg -x`), and name the directory'
        )
    for testament in ('ot', 'nt'):
        chapter, heading = '', 0
        for i, entry in enumerate(_entries(directories[0] / testament)):
            if named := _CHAPTER.search(entry):
                chapter, heading = named[1], i
            plain = html.unescape(_TAG.sub('', _NOTES.sub(' ', entry)))  # a note may part words
            text = _BEFORE_MARK.sub(r'\1', ' '.join(plain.split()))
            if chapter and i > heading and text:
                found[chapter, i - heading] = text
    return found


def _entries(path: Path) -> list[str]:
    blocks, places, content = (
        path.with_suffix(suffix).read_bytes() for suffix in ('.bzs', '.bzv', '.bzz')
    )

    @functools.cache
    def block(number: int) -> bytes:
        offset, size, _ = struct.unpack_from('<III', blocks, 12 * number)
        return zlib.decompress(content[offset : offset + size])

    return [
        block(number)[at : at + size].decode('utf-8', errors='replace') if size else ''
        for number, at, size in struct.iter_unpack('<IIH', places)
    ]

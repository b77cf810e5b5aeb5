"""Removal of near-duplicate documents by the share of word shingles seen before."""

import re
import zlib
from collections.abc import Iterable

import numpy as np

_SHINGLE_WORDS = 8
_SHORT_WORDS = 64
_WORD = re.compile(r'\w+')


def near_duplicates(texts: Iterable[str], *, threshold: float = 0.5) -> list[bool]:
    """Says of each text whether it nearly repeats earlier ones.

    A text is a near-duplicate when `threshold` or more of its shingles (8 words in a row; a fixed
    quarter of them is looked at) occur in the texts kept before it, in one or in several. A text
    below 64 words has one shingle, all of it. Near-duplicates add nothing to what was seen, so two
    texts that were both kept share less than `threshold` of the later one's shingles.
    """
    seen: set[int] = set()
    found = []
    for text in texts:
        shingles = _shingles(text)
        repeated = sum(shingle in seen for shingle in shingles)
        duplicate = bool(shingles) and repeated >= threshold * len(shingles)
        if not duplicate:
            seen.update(shingles)
        found.append(duplicate)
    return found


def _shingles(text: str) -> list[int]:
    words = _WORD.findall(text)
    # crc32 and not hash(), which differs from one Python process to the next.
    hashes = np.array([zlib.crc32(word.encode('utf-8', 'replace')) for word in words], np.uint64)
    width = _SHINGLE_WORDS if len(words) >= _SHORT_WORDS else len(words)
    count = len(words) - width + 1 if words else 0
    shingles = np.zeros(count, np.uint64)
    for offset in range(width):
        # Multiplication modulo 2^64 by an odd number (2^64 over the golden ratio) mixes the bits.
        shingles = (shingles ^ hashes[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
        shingles ^= shingles >> np.uint64(29)
    if len(words) >= _SHORT_WORDS:
        shingles = shingles[shingles % np.uint64(4) == 0]
    return np.unique(shingles).tolist()

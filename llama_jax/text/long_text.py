"""Long texts are encoded in parts, which gives the ids of the whole in linear time and flat memory.

Libraries hold hundreds of bytes for every character of a text while they encode it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

PART = 1 << 16
"""Characters that are encoded at a time."""
_AHEAD = 1 << 11
"""Characters behind a part that are read before it is cut between two of its tokens."""


def pairs_within(pieces: Iterable[str]) -> frozenset[str]:
    """Every two characters that stand side by side in a piece."""
    return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))


def encode_in_parts(
    text: str,
    encode: Callable[[str], list[int]],
    *,
    pairs: frozenset[str],
    byte_lengths: np.ndarray,
) -> Iterator[np.ndarray]:
    """The ids of `text`, int32, part by part.

    `encode` puts nothing before a text and normalises nothing; `pairs` are `pairs_within` its
    pieces; `byte_lengths` is the UTF-8 of each id.

    A part ends between two characters that no piece holds side by side. Where there are none (a run
    of one letter), it ends between two tokens: pieces are merged, or weighed, on either side of a
    boundary as if the other were not there, so what follows may be encoded alone. The characters
    ahead make it a boundary of the whole text and not of the part's end.
    """
    start = 0
    while len(text) - start > PART:
        end = start + PART
        while end > start and text[end - 1 : end + 1] in pairs:
            end -= 1
        if end > start:
            yield np.array(encode(text[start:end]), np.int32)
            start = end
            continue
        window = text[start : start + PART + _AHEAD]
        ids = np.array(encode(window), np.int32)
        n, characters = _whole_tokens(ids, window, byte_lengths)
        yield ids[:n]
        start += characters
    yield np.array(encode(text[start:]), np.int32)


def _whole_tokens(ids: np.ndarray, window: str, byte_lengths: np.ndarray) -> tuple[int, int]:
    """How many of the first `ids` end within PART, where a character ends; and the characters that
    they stand for."""
    data = window.encode()
    most = len(window[:PART].encode())
    ends = np.cumsum(byte_lengths[ids])
    n = int(np.searchsorted(ends, most, side='right'))
    while ends[n - 1] < len(data) and data[ends[n - 1]] & 0xC0 == 0x80:  # inside of a character
        n -= 1
    return n, len(data[: ends[n - 1]].decode())


def words_in_parts(text: str) -> Iterator[str]:
    """`text` in parts that end before a space between two words: there every splitter of words that
    byte-level vocabularies use has a boundary, whatever stands around. Whole where there is none.
    """
    start = 0
    while len(text) - start > PART:
        end = start + PART
        while end > start and not _between_words(text, end):
            end -= 1
        if end == start:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _between_words(text: str, i: int) -> bool:
    return text[i] == ' ' and not (text[i - 1].isspace() or text[i + 1 : i + 2].isspace())

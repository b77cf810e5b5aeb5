"""Near-duplicates among short texts, as tokens: two that share most of their shingles."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

_WIDTH = 5
"""Tokens of a shingle."""
_SHARE = 0.5


class Near:
    """Texts seen so far. Whole documents are compared by data/deduplicate.py, where a shingle is
    eight words; a chunk of 64 tokens has few of those, and in Chinese none."""

    def __init__(self) -> None:
        self._n = 0
        self._with: dict[bytes, list[int]] = defaultdict(list)

    def repeats(self, tokens: np.ndarray) -> bool:
        """Whether half of the text's shingles stand in one single earlier text. A text of which
        that is not so is remembered."""
        shingles = _shingles(tokens)
        shared = Counter(i for shingle in shingles for i in self._with.get(shingle, ()))
        if shared and max(shared.values()) >= _SHARE * len(shingles):
            return True
        for shingle in shingles:
            self._with[shingle].append(self._n)
        self._n += 1
        return False


def _shingles(tokens: np.ndarray) -> set[bytes]:
    tokens = np.ascontiguousarray(tokens, np.int32)
    n = max(len(tokens) - _WIDTH + 1, 1)
    return {tokens[i : i + _WIDTH].tobytes() for i in range(n)}

"""Real text for benchmarks: the source of Python's standard library, as token ids."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np


def token_rows(n_rows: int, length: int, vocab: int) -> np.ndarray:
    """Rows [n_rows, length] of ids below `vocab`: one id a word, so that they repeat as text."""
    words: list[str] = []
    for path in sorted(Path(sysconfig.get_path('stdlib')).glob('*.py')):
        words += path.read_text(encoding='utf-8').split()
        if len(words) >= n_rows * length:
            break
    ids = {word: i % vocab for i, word in enumerate(dict.fromkeys(words))}
    flat = np.array([ids[word] for word in words[: n_rows * length]], np.int32)
    return np.resize(flat, (n_rows, length))

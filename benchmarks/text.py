"""Real text for benchmarks, as token ids: the source of Python's standard library, or files."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from pydoc_data import topics

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.vocabulary import Vocabulary

CODE_AND_PROSE = (Path(argparse.__file__), Path(topics.__file__))


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


def encoded(path: Path, vocabulary: Vocabulary, *, least: int) -> np.ndarray:
    """Token ids of a file. Raises UserError where they are fewer than `least`."""
    if not path.is_file():
        raise UserError(f'{path} is missing: name a text file')
    ids = vocabulary.encode(path.read_text(encoding='utf-8'))
    if len(ids) < least:
        raise UserError(f'{path} has {len(ids)} tokens: give a text of at least {least}')
    return ids

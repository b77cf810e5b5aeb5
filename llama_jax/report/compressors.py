"""Bits per byte of general compressors: the yardsticks beside a model's."""

from __future__ import annotations

import json
import lzma
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

from llama_jax.data.config import DataConfig, labels
from llama_jax.data.sources import Corpus, open_sources
from llama_jax.errors import UserError
from llama_jax.report.read import read_object
from llama_jax.train.progress import say
from llama_jax.train.records import write_atomically

SAMPLE_BYTES = 8_000_000
"""Of the held-out text: xz -9 takes about 10 s for them on one core, whatever the size of the
corpus, and its figure hardly falls any more."""

_GOLDEN = (math.sqrt(5) - 1) / 2

_METHOD = 1
"""Figures of another one are computed again."""


def write_baselines(config: DataConfig, path: Path) -> None:
    """Write what the compressors make of a sample of the validation split as JSON to `path`, unless
    it is there for the same data."""
    corpus = open_sources(config, 'validation')
    digest = f'{corpus.digest[:32]}-{SAMPLE_BYTES}-{_METHOD}'
    try:
        known = read_object(path) or {}
    except UserError:  # damaged
        known = {}
    if known.get('digest') == digest:
        return
    texts = sample(corpus, SAMPLE_BYTES)
    n_bytes = sum(len(text.encode()) for text in texts)
    say(f'compressing {n_bytes:,} bytes of held-out text with xz and zlib, to compare with')
    facts = {
        'split': _told(config),
        **compress(texts),
        'of_documents': sum(corpus.sizes),
        'digest': digest,
    }
    write_atomically(path, json.dumps(facts))


def _told(config: DataConfig) -> str:
    """Which text it is, for people: a split, or the names of several sets."""
    found = config.of('validation')
    splits = {source.split or '' for source in found}
    return splits.pop() if len(splits) == 1 and not config.validation else ', '.join(labels(found))


def sample(corpus: Corpus, n_bytes: int) -> list[str]:
    """Documents of `n_bytes` in all, or all that there are, in stored order: always the same ones,
    evenly spread over the corpus. The last that is taken is cut to fit."""
    total = sum(corpus.sizes)
    taken: dict[int, str] = {}
    # Steps of a golden section fill a circle evenly, however many are made; in three rounds they
    # come to every document.
    for i in range(3 * total):
        place = int(i * _GOLDEN % 1 * total)
        if place in taken:
            continue
        if n_bytes <= 0 or len(taken) == total:
            break
        data = _document(corpus, place).encode()[:n_bytes]
        taken[place] = data.decode('utf-8', 'ignore')
        n_bytes -= len(data)
    return [text for _, text in sorted(taken.items())]


def _document(corpus: Corpus, place: int) -> str:
    for source in corpus.sources:
        if place < len(source):
            return source[place]
        place -= len(source)
    raise IndexError(place)


def compress(documents: Iterable[str]) -> dict[str, int | float]:
    """Compress held-out text with the compressors of every machine.

    Returns 'documents' and 'bytes' (of UTF-8), and in bits per byte of that text 'xz', which is
    `xz -9` of all documents one after the other with nothing between them, and
    'zlib_per_document', which is zlib at level 9 of each document by itself, headers counted. The
    first sees across documents, which a model that attends within a document does not; the second
    does not. Raises UserError when there is no text.
    """
    n_documents = n_bytes = n_xz = n_zlib = 0
    whole = lzma.LZMACompressor(lzma.FORMAT_XZ, preset=9)
    for document in documents:
        data = document.encode()
        n_documents += 1
        n_bytes += len(data)
        n_xz += len(whole.compress(data))
        n_zlib += len(zlib.compress(data, 9))
    n_xz += len(whole.flush())
    if not n_bytes:
        raise UserError(
            f'no text to compress in {n_documents} documents: choose a split that holds text'
        )
    return {
        'documents': n_documents,
        'bytes': n_bytes,
        'xz': 8 * n_xz / n_bytes,
        'zlib_per_document': 8 * n_zlib / n_bytes,
    }

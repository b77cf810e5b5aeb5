"""Bits per byte of general compressors: the yardsticks beside a model's."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable

from llama_jax.errors import UserError


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

"""What each text adds to a metric, kept beside evaluation.json: differences between runs are taken
on the same texts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.train.records import write_atomically

SUFFIX = '.npz'
"""evaluation.npz stands beside evaluation.json."""


class Identity(NamedTuple):
    """Which texts they are, and of which documents: the same numbers in every run."""

    text_N: np.ndarray
    """uint64 hash of what stands there."""
    document_N: np.ndarray
    """uint64: texts of one document are resampled together."""


class PerText(NamedTuple):
    """A metric is sum(over) / sum(under) over its texts."""

    over_N: np.ndarray
    under_N: np.ndarray
    of: Identity

    @property
    def value(self) -> float:
        return float(self.over_N.sum() / self.under_N.sum())


def identity(text: Any) -> int:
    """Of tokens, of several token arrays (a pair, a text in parts), or of a name."""
    hashed = hashlib.sha256()
    for part in text if isinstance(text, (tuple, list)) else (text,):
        data = part.encode() if isinstance(part, str) else np.asarray(part, '<i8').tobytes()
        hashed.update(len(data).to_bytes(8, 'little') + data)
    return int.from_bytes(hashed.digest()[:8], 'little')


def identify(texts: Sequence[Any], documents: Sequence[Any] | None = None) -> Identity:
    """The identity of texts; without documents each is one by itself."""
    own = np.array([identity(text) for text in texts], np.uint64)
    if documents is None:
        return Identity(own, own)
    return Identity(own, np.array([identity(name) for name in documents], np.uint64))


def write(path: Path, result: Mapping[str, Any], *, indent: int = 1) -> None:
    """Write a result of `suite.evaluate` to the JSON file `path`, and what it has per text beside
    it; the JSON comes last, for it marks a run as finished."""
    texts = result.get('texts')
    if texts:
        _write_arrays(path.with_suffix(SUFFIX), texts)
    plain = {name: value for name, value in result.items() if name != 'texts'}
    write_atomically(path, json.dumps(plain, indent=indent))


def read(path: Path) -> dict[str, PerText]:
    """What the result at `path`, an evaluation.json, has per text; {} where it is not there or
    damaged."""
    found: dict[str, PerText] = {}
    try:
        with np.load(path.with_suffix(SUFFIX), allow_pickle=False) as arrays:
            for name in [key.removesuffix('/over') for key in arrays if key.endswith('/over')]:
                of = int(arrays[f'{name}/of'])
                identities = (arrays[f'of/{of}/{part}'] for part in ('text', 'document'))
                over_N, under_N = arrays[f'{name}/over'], arrays[f'{name}/under']
                found[name] = PerText(over_N, under_N, Identity(*identities))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}
    return found


def _write_arrays(path: Path, texts: Mapping[str, PerText]) -> None:
    arrays: dict[str, Any] = {}
    numbers: dict[bytes, int] = {}
    for name, kept in texts.items():
        # Metrics of one task have the same texts, which are kept once.
        key = kept.of.text_N.tobytes() + kept.of.document_N.tobytes()
        number = numbers.setdefault(key, len(numbers))
        arrays |= {f'of/{number}/text': kept.of.text_N, f'of/{number}/document': kept.of.document_N}
        arrays |= {f'{name}/over': kept.over_N, f'{name}/under': kept.under_N, f'{name}/of': number}
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}-')
    with os.fdopen(handle, 'wb') as file:
        file.write(data.getvalue())
    os.chmod(partial, 0o644)
    os.replace(partial, path)

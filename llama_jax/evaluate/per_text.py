"""What each text contributes to a metric: kept beside the means, so that differences are paired."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.errors import UserError
from llama_jax.evaluate import stats
from llama_jax.evaluate.stats import Result


class PerText(NamedTuple):
    """The metric is over.sum() / under.sum()."""

    ids: np.ndarray
    """Text [n], of each text: equal where the text is, whatever model was measured."""
    documents: np.ndarray
    """Text [n]: what each is a part of; texts of one document are not independent."""
    over: np.ndarray
    """Float64 [n]."""
    under: np.ndarray
    """Float64 [n]: ones for a mean, bytes for bits per byte."""


def measured(
    over: Sequence[float] | np.ndarray,
    *,
    ids: Sequence[str],
    documents: Sequence[str],
    under: Sequence[float] | np.ndarray | None = None,
    seed: int,
) -> tuple[Result, PerText]:
    """A metric as a result, whose interval resamples whole documents, and its parts."""
    over_N = np.asarray(over, np.float64)
    under_N = np.ones(len(over_N)) if under is None else np.asarray(under, np.float64)
    of = PerText(np.array(ids, str), np.array(documents, str), over_N, under_N)
    _, document_N = np.unique(of.documents, return_inverse=True)
    over_M, under_M = (np.bincount(document_N, x_N) for x_N in (over_N, under_N))
    found = stats.of_ratio(over_M, under_M, seed=seed)
    if len(over_M) < 2:  # one says nothing of others
        found |= {'low': None, 'high': None}
    return {**found, 'n': len(over_N)}, of


def text_id(*parts: np.ndarray) -> str:
    """Of a text in one or several arrays of tokens: 16 hexadecimal digits."""
    tokens = np.concatenate([np.asarray(part) for part in parts]).astype('<i4')
    return hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()


def save(path: Path, texts: Mapping[str, PerText]) -> None:
    """Write all metrics to one compressed .npz."""
    arrays = {
        f'{metric}/{name}': array
        for metric, of in texts.items()
        for name, array in of._asdict().items()
    }
    partial = path.with_name(f'.{path.name}.partial')
    with partial.open('wb') as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)


def load(path: Path) -> dict[str, PerText]:
    """What `save` wrote, by metric; nothing where there is no file. Raises UserError for a file
    that is damaged."""
    if not path.exists():
        return {}
    try:
        with path.open('rb') as file, np.load(file) as arrays:
            metrics = dict.fromkeys(name.rpartition('/')[0] for name in arrays.files)
            return {
                metric: PerText(*(arrays[f'{metric}/{name}'] for name in PerText._fields))
                for metric in metrics
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f'{path} cannot be read ({error}): delete it and evaluation.json beside it, and the '
            'run is measured again'
        ) from error

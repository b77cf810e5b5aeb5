"""What a run will read, looked at as a whole: `--check` trains nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from llama_jax.data.encoded import MEND_BAD, Records
from llama_jax.data.record import Text
from llama_jax.data.whole import MEND_LONG
from llama_jax.errors import UserError
from llama_jax.train.experiment import Experiment
from llama_jax.train.show import loader_of, opened

_SHARES = {'median': 50, '90%': 90, '99%': 99, 'longest': 100}
"""Percentiles of lengths, by name."""


def check_data(experiment: Experiment) -> None:
    """Read and encode all data of a run, and print of each source how many documents or records it
    has, how long they are, how many of their tokens bear loss, and how full rows are.

    Raises UserError in the end where a run would refuse some of the records.
    """
    experiment, tokenizer = opened(experiment)
    objective, train, data = experiment.objective, experiment.train, experiment.data
    lenient = experiment
    if objective.reads is not Text:  # to see them all, and name them in the log
        too_long = 'drop' if data.too_long == 'refuse' else data.too_long
        reading = dataclasses.replace(data, bad_records='drop', too_long=too_long)
        lenient = dataclasses.replace(experiment, data=reading)
    bad = long = 0
    splits: tuple[Literal['train', 'validation'], ...] = ('train', 'validation')
    for split in splits if experiment.evaluation.every else splits[:1]:
        with loader_of(lenient, tokenizer, split=split, epochs=1) as loader:
            for source, label in enumerate(loader.labels):
                texts, sizes_DS = loader.texts[source], loader.sizes(source)
                print(f'{split} of {label}:')
                for line in _lines(texts, sizes_DS, objective.lengths(train.seq_len)):
                    print(f'  {line}')
                if isinstance(texts, Records):
                    bad += texts.bad
                    long += _too_long(sizes_DS, objective.lengths(train.seq_len))
            rows, used = loader.filled()
        padding = ', '.join(
            f'{1 - share:.1%} padding{f" of {name}" if name else ""}'
            for name, share in zip(objective.lengths(train.seq_len), used, strict=True)
        )
        print(
            f'an epoch of {split}: {rows:,} rows of {train.seq_len:,}, {padding}; '
            f'{math.ceil(rows / train.batch):,} steps of {train.batch:,} rows',
            flush=True,
        )
    refused = [
        f'{count:,} {what}: {remedy}'
        for count, what, remedy, policy in (
            (bad, 'bad records', MEND_BAD, data.bad_records),
            (long, 'too long records', MEND_LONG, data.too_long),
        )
        if count and policy == 'refuse'
    ]
    if refused:
        raise UserError(f'a run would refuse {"; and ".join(refused)}')


def _lines(texts: object, sizes_DS: np.ndarray, lengths: dict[str, int]) -> Iterator[str]:
    """What there is to say of a source."""
    good_DS = sizes_DS[sizes_DS[:, 0] >= 0]
    what = f'{len(sizes_DS):,} documents'
    if isinstance(texts, Records):
        long = _too_long(sizes_DS, lengths)
        what = f'{len(texts):,} records, of which {texts.bad:,} bad and {long:,} too long'
        share = texts.loss_tokens / max(texts.tokens, 1)
        what += f'; {texts.loss_tokens:,} of {texts.tokens:,} tokens bear loss ({share:.1%})'
    yield what
    if not len(good_DS):
        return
    for (name, room), sizes_D in zip(
        lengths.items() if isinstance(texts, Records) else [('', 0)], good_DS.T, strict=True
    ):
        found = ', '.join(
            f'{said} {int(np.percentile(sizes_D, share)):,}' for said, share in _SHARES.items()
        )
        unit = f'positions{f" of {name}" if name else ""}' if room else 'tokens'
        yield f'{unit}: {found}{f" (a row has {room:,})" if room else ""}'


def _too_long(sizes_DS: np.ndarray, lengths: dict[str, int]) -> int:
    return int(np.any(sizes_DS > np.array([*lengths.values()]), axis=1).sum())

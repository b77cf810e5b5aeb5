"""What each arm is given: tokens, loss tokens, unique tokens, parameters and FLOPs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from llama_jax import trees
from llama_jax.compare.grid import Arm, Grid
from llama_jax.data import order
from llama_jax.data.loader import Loader
from llama_jax.data.sources import Corpus
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment
from llama_jax.train.step import initial_params

SAMPLE = 8
"""Batches of each arm that are counted."""
DOCUMENTS = 1000
"""Documents whose tokens are counted for the size of the corpus."""

MATCHED = ('train.steps', 'optimizer.schedule.warmup_steps')
"""What `match_flops` changes."""


@dataclass(frozen=True)
class Budget:
    """A row of the budget table; all for one run of the arm."""

    arm: str
    tokens: int
    """Positions that the backbone processes: steps x rows x positions of a row."""
    loss_tokens: int
    """Tokens that bear loss: measured in the sample, for all steps."""
    unique_tokens: int
    """Tokens of raw text that are read, each document counted once: measured likewise."""
    parameters: int
    """The objective's own included."""
    flops: float


@dataclass(frozen=True)
class Text:
    """The training text of an experiment, with the tokenizer."""

    corpus: Corpus
    tokenizer: Tokenizer
    _lengths: dict[tuple[int, int], int] = field(default_factory=dict)

    def tokens(self, source: int, record: int) -> np.ndarray:
        return self.tokenizer.encode(self.corpus.sources[source][record])

    def length(self, entry: order.Entry) -> int:
        """Tokens of a document; counted once, for all arms."""
        key = entry[0], entry[2]
        if key not in self._lengths:
            self._lengths[key] = len(self.tokens(*key))
        return self._lengths[key]


def budget(arm: Arm, text: Text) -> Budget:
    """Measures SAMPLE batches of the arm under its own seed."""
    experiment = arm.experiment
    train, objective = experiment.train, experiment.objective
    batches = min(SAMPLE, train.steps)
    with Loader(
        replace(experiment.data, workers=0, prefetch=1),
        split='train',
        tokenizer=text.tokenizer,
        example=objective.example,
        splittable=objective.splittable,
        lengths=objective.lengths(train.seq_len),
        segments=objective.segments(train.seq_len),
        batch=train.batch,
        seq_len=train.seq_len,
        seed=experiment.seed,
    ) as loader:
        loss_tokens = 0
        for batch in itertools.islice(loader, batches):
            cursor = batch.pop('cursor')
            loss_tokens += objective.loss_tokens(batch)
    share = train.steps / batches
    parameters = jax.eval_shape(
        lambda: initial_params(experiment.model, objective, jax.random.key(0))
    )
    return Budget(
        arm=arm.name,
        tokens=tokens(experiment),
        loss_tokens=round(share * loss_tokens),
        unique_tokens=_unique(experiment, text, share * _raw_tokens(experiment, text, cursor)),
        parameters=trees.size(parameters),
        flops=flops(experiment),
    )


def tokens(experiment: Experiment) -> int:
    """Positions that the backbone processes in a run."""
    train = experiment.train
    return train.steps * train.batch * train.seq_len


def flops(experiment: Experiment) -> float:
    """FLOPs of all steps of a run."""
    seq_len = experiment.train.seq_len
    return tokens(experiment) * experiment.objective.flops(experiment.model, seq_len)


def _raw_tokens(experiment: Experiment, text: Text, cursor: np.ndarray) -> float:
    """Tokens of raw text that were read up to `cursor` [B, 2] of training."""
    stream = _stream(experiment, text.corpus)
    read = 0.0
    for lane, (whole, taken) in enumerate(cursor.tolist()):
        entries = [stream[lane + k * len(cursor)] for k in range(whole + bool(taken))]
        sizes = [text.length(entry) for entry in entries]
        read += sum(sizes[:whole])
        if taken:
            source, epoch, record = entries[-1]
            examples = experiment.objective.example(
                text.tokens(source, record),
                tokenizer=text.tokenizer,
                seq_len=experiment.train.seq_len,
                rng=np.random.default_rng([experiment.seed, epoch, source, record]),
            )
            # The cursor counts an example by the longest of its arrays, as the packer does.
            made = sum(max(len(x) for x in example.values()) for example in examples)
            read += sizes[-1] * taken / made
    return read


def _unique(experiment: Experiment, text: Text, read: float) -> int:
    """Of so many raw tokens read, those that are not of a document read before."""
    stream, sizes = _stream(experiment, text.corpus), text.corpus.sizes
    n = min(DOCUMENTS, sum(sizes))
    lengths: dict[int, list[int]] = {}
    for entry in (stream[i] for i in range(n)):
        lengths.setdefault(entry[0], []).append(text.length(entry))
    documents = read / max(1e-9, sum(map(sum, lengths.values())) / n)  # of all sources
    unique = 0.0
    for source, counted in lengths.items():
        of_source = min(documents * len(counted) / n, sizes[source])
        unique += of_source * sum(counted) / len(counted)
    return round(min(unique, read))


def _stream(experiment: Experiment, corpus: Corpus) -> order.grain.MapDataset:
    return order.training_order(corpus.sizes, corpus.weights, seed=experiment.seed)


def match_flops(grid: Grid) -> Grid:
    """The grid with as many FLOPs in every arm as in the first, to the nearest step.

    Steps and warm-up change in proportion, so that the schedule has the same shape.
    """
    goal = flops(grid.arms[0].experiment)
    arms = []
    for arm in grid.arms:
        train, optimizer = arm.experiment.train, arm.experiment.optimizer
        ratio = goal / flops(arm.experiment)
        warmup = round(optimizer.schedule.warmup_steps * ratio)
        experiment = replace(
            arm.experiment,
            train=replace(train, steps=max(1, round(train.steps * ratio))),
            optimizer=replace(optimizer, schedule=replace(optimizer.schedule, warmup_steps=warmup)),
        )
        arms.append(replace(arm, experiment=experiment))
    return replace(grid, arms=tuple(arms), may_differ=(*grid.may_differ, *MATCHED))


def table(rows: list[Budget]) -> str:
    """The budget table for a terminal, FLOPs also over those of the first arm."""
    head = ('arm', 'tokens', 'loss tokens', 'unique tokens', 'parameters', 'FLOPs', 'relative')
    lines = [head] + [
        (
            row.arm,
            *(f'{n:,}' for n in (row.tokens, row.loss_tokens, row.unique_tokens, row.parameters)),
            f'{row.flops:.3g}',
            f'{row.flops / rows[0].flops:.2f}',
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
        '  '.join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )

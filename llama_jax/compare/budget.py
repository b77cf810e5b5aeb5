"""What each arm is given: tokens, loss tokens, unique tokens, parameters and FLOPs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np

from llama_jax import trees
from llama_jax.compare.grid import Arm, Grid, Match, check_steps
from llama_jax.data.config import DataConfig
from llama_jax.data.loader import Loader
from llama_jax.data.pieces import longest
from llama_jax.data.plan import Cursor
from llama_jax.data.record import Text as PlainText
from llama_jax.data.sources import Corpus
from llama_jax.data.tokens import Texts, tokenised
from llama_jax.objectives.base import Objective
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.checkpoint import difference
from llama_jax.train.experiment import Experiment, to_dict
from llama_jax.train.flops import flops_per_token
from llama_jax.train.start import chat_read
from llama_jax.train.step import initial_params

SAMPLE = 8
"""Batches of each arm that are counted."""


@dataclass(frozen=True)
class Budget:
    """A row of the budget table; all for one run of the arm."""

    arm: str
    tokens: int
    """Positions that the backbone processes: steps x rows x positions of a row."""
    loss_tokens: int
    """Tokens that bear loss: measured in the sample, for all steps."""
    unique_tokens: int
    """Tokens of raw text that are read, each counted once: measured likewise."""
    text_seen: int
    """Tokens of raw text that are read, as often as they are read: measured likewise."""
    padding: float
    """Share of the positions that no text fills: measured in the sample."""
    cut: float
    """Share of the documents of which the arm makes no single example, so that it reads them in
    pieces: some objectives have less room in a row than others."""
    parameters: int
    """The objective's own included."""
    flops: float


@dataclass(frozen=True)
class Text:
    """The training text of an experiment, with the tokenizer."""

    corpus: Corpus
    tokenizer: Tokenizer

    @functools.cached_property
    def texts(self) -> tuple[Texts, ...]:
        """Each source as token ids."""
        return tokenised(self.corpus, self.tokenizer)


def budget(arm: Arm, text: Text) -> Budget:
    """Measures SAMPLE batches of the arm under its own seed."""
    experiment = arm.experiment
    train, objective = experiment.train, experiment.objective
    batches = min(SAMPLE, train.steps)
    with Loader(
        replace(experiment.data, workers=0, prefetch=1),
        split='train',
        tokenizer=text.tokenizer,
        maker=objective,
        batch=train.batch,
        seq_len=train.seq_len,
        seed=experiment.seed_of('data'),
        masks=experiment.seed_of('masks'),
        chat=chat_read(experiment),
    ) as loader:
        loss_tokens = filled = positions = 0
        for batch in itertools.islice(loader, batches):
            cursor = batch.pop('cursor')
            loss_tokens += objective.loss_tokens(batch)
            for name, segments in batch.items():
                if name.endswith('segments'):
                    filled += int((segments > 0).sum())
                    positions += segments.size
        read = Cursor.loads(cursor).read
    share = train.steps / batches
    text_seen = [share * (units - objective.ends * documents) for units, documents in read]
    lengths = np.concatenate([np.diff(texts.offsets) for texts in text.texts])
    parameters = jax.eval_shape(
        lambda: initial_params(experiment.model, objective, jax.random.key(0))
    )
    return Budget(
        arm=arm.name,
        tokens=tokens(experiment),
        loss_tokens=round(share * loss_tokens),
        # No text comes twice before all of its source did.
        unique_tokens=sum(
            round(min(seen, texts.tokens))
            for texts, seen in zip(text.texts, text_seen, strict=True)
        ),
        text_seen=round(sum(text_seen)),
        padding=1 - filled / max(positions, 1),
        cut=_cut(objective, lengths, train.seq_len),
        parameters=trees.size(parameters),
        flops=flops(experiment),
    )


def _cut(objective: Objective, lengths: np.ndarray, seq_len: int) -> float:
    """Share of the documents of so many tokens that are read in pieces; records never are."""
    if objective.reads is not PlainText or not len(lengths):
        return 0.0
    room = tuple(objective.lengths(seq_len).values())
    most = int(lengths.max()) + objective.ends
    whole = longest(objective, most, room=room, seq_len=seq_len, draw=0.5) - objective.ends
    return float((lengths > whole).mean())


def tokens(experiment: Experiment) -> int:
    """Positions that the backbone processes in a run."""
    train = experiment.train
    return train.steps * train.batch * train.seq_len


def flops(experiment: Experiment) -> float:
    """FLOPs of all steps of a run, those of a teacher that runs in them included."""
    return tokens(experiment) * flops_per_token(experiment)


def match_flops(grid: Grid) -> Grid:
    """The grid with as many FLOPs in every arm as in the first, to the nearest step.

    Steps, warm-up and the steps that an objective counts change in proportion, so that schedules
    have the same shape.
    """
    check_steps(grid)
    return _matched(grid, 'flops', [flops(arm.experiment) for arm in grid.arms])


def match_text(grid: Grid, text: Callable[[DataConfig], Text]) -> Grid:
    """The same with as many tokens of raw text: objectives fill a row by more or less of it."""
    check_steps(grid)
    firsts = [replace(arm, experiment=replace(arm.experiment, seed=0)) for arm in grid.arms]
    rows = [budget(arm, text(arm.experiment.data)) for arm in firsts]
    return _matched(grid, 'text', [float(row.text_seen) for row in rows])


def _matched(grid: Grid, match: Match, found: list[float]) -> Grid:
    arms = []
    for arm, mine in zip(grid.arms, found, strict=True):
        train, optimizer = arm.experiment.train, arm.experiment.optimizer
        ratio = found[0] / mine
        warmup = round(optimizer.schedule.warmup_steps * ratio)
        experiment = replace(
            arm.experiment,
            train=replace(train, steps=max(1, round(train.steps * ratio))),
            objective=arm.experiment.objective.stretched(ratio),
            optimizer=replace(optimizer, schedule=replace(optimizer.schedule, warmup_steps=warmup)),
        )
        if match == 'flops' and ratio != 1:
            experiment = _to_a_step(experiment, found[0])
        arms.append(replace(arm, experiment=experiment))
    pairs = [
        (to_dict(a.experiment), to_dict(b.experiment)) for a, b in zip(grid.arms, arms, strict=True)
    ]
    fields = {line.split(':')[0] for pair in pairs for line in difference(*pair)}
    changed = sorted(fields, reverse=True)  # the length first
    may_differ = tuple(dict.fromkeys([*grid.may_differ, *changed]))
    # Rates that were chosen for other lengths are not chosen for these.
    tuned = grid.tuned if all(mine == found[0] for mine in found) else ''
    return replace(grid, arms=tuple(arms), may_differ=may_differ, match=match, tuned=tuned)


def last_step(experiment: Experiment) -> float:
    """FLOPs of one step more, which is of the last part of a schedule of objectives."""
    train = experiment.train
    return flops(replace(experiment, train=replace(train, steps=train.steps + 1))) - flops(
        experiment
    )


def _to_a_step(experiment: Experiment, goal: float) -> Experiment:
    """With the steps that come nearest to `goal` FLOPs: where parts begin is rounded as well."""
    train = experiment.train
    more = round((goal - flops(experiment)) / last_step(experiment))
    return replace(experiment, train=replace(train, steps=max(1, train.steps + more)))


def table(rows: list[Budget]) -> str:
    """The budget table for a terminal, FLOPs also over those of the first arm."""
    counts = ('tokens', 'text positions', 'loss tokens', 'unique tokens', 'text seen')
    head = ('arm', *counts, 'padding', 'cut', 'parameters', 'FLOPs', 'relative')
    lines = [head] + [
        (
            row.arm,
            *(f'{n:,}' for n in (row.tokens, round(row.tokens * (1 - row.padding)))),
            *(f'{n:,}' for n in (row.loss_tokens, row.unique_tokens, row.text_seen)),
            *(f'{row.padding:.1%}', f'{row.cut:.1%}'),
            f'{row.parameters:,}',
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

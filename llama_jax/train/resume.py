"""What may change when a run goes on, what must not, and how its learning rate goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llama_jax.errors import UserError
from llama_jax.optim.schedule import Ramp, change, schedule
from llama_jax.train.checkpoint import difference, present
from llama_jax.train.experiment import Experiment, from_dict, to_dict
from llama_jax.train.records import read_run
from llama_jax.train.restore import by_tokenizer
from llama_jax.train.start import check_start

FORMAT = 3
"""Of what a checkpoint holds beside the parameters; a run goes on from its own format only."""

_ANOTHER = 'give another --workdir'
_ADAPTED = 'give another --workdir and --start {workdir}, which begins with the parameters trained'


class Rule(NamedTuple):
    """What holds for some settings when a run goes on."""

    settings: tuple[str, ...]
    """Dotted names; * stands for any number. A name speaks for all settings within it."""
    rule: Literal['may change', 'by content', 'fixed']
    why: str
    remedy: str = ''
    """What to do to train with another value, where it is fixed."""


RULES = (
    Rule(('name', 'data.sources.*.label'), 'may change', 'a label'),
    Rule(
        ('mesh', 'compute'),
        'may change',
        'where and how the same update is computed, equal but for rounding',
    ),
    Rule(
        ('train.accumulate',),
        'may change',
        'the same update in other pieces; draws on devices, such as dropout, are others',
    ),
    Rule(
        ('data.workers', 'data.prefetch'),
        'may change',
        'who makes the batches and how far ahead, not which',
    ),
    Rule(
        ('evaluation', 'data.validation_split', 'data.test_split', 'data.validation'),
        'may change',
        'what is measured, not what is trained; the best is found anew where texts change',
    ),
    Rule(
        ('checkpoint', 'train.log_every', 'train.max_nonfinite', 'evaluation.patience'),
        'may change',
        'what is kept and told, and when it gives up',
    ),
    Rule(
        ('train.steps', 'train.tokens', 'train.epochs'),
        'may change',
        'no fewer than are taken; the learning rate moves to the new schedule',
    ),
    Rule(('optimizer.schedule',), 'may change', 'the learning rate moves to the new schedule'),
    Rule(
        (
            *('optimizer.clip', 'optimizer.weight_decay', 'optimizer.decay_embeddings'),
            *('optimizer.beta1', 'optimizer.beta2', 'optimizer.eps', 'optimizer.layer_decay'),
            *('optimizer.beta', 'optimizer.decay', 'optimizer.clip_rms'),
        ),
        'may change',
        'they hold from the next step on; the moments stay',
    ),
    Rule(
        (
            *('data.sources.*.name', 'data.sources.*.files', 'data.sources.*.data_dir'),
            *('data.sources.*.exclude', 'data.sources.*.split', 'data.tokenizer'),
        ),
        'by content',
        'files may have moved: the documents and the tokenizer must be the same',
    ),
    Rule(('model',), 'fixed', 'the arrays would not fit, or mean another model', _ANOTHER),
    Rule(
        ('model.context', 'model.rope_theta', 'model.rope_scaling', 'model.dropout'),
        'fixed',
        'another model with the same arrays',
        _ADAPTED,
    ),
    Rule(
        ('data', 'train.batch', 'train.seq_len', 'objective', 'seed', 'randomness'),
        'fixed',
        'the place in the data would mean other batches',
        _ADAPTED,
    ),
    Rule(
        ('optimizer.class', 'optimizer.moments', 'optimizer.momentum'),
        'fixed',
        'the state saved is of another optimizer, or of the other type',
        _ADAPTED,
    ),
    Rule(('optimizer.spikes',), 'fixed', 'the mean of the losses is saved with it', _ADAPTED),
    Rule(('optimizer.average',), 'fixed', 'the average saved is of the other decay', _ADAPTED),
    Rule(('tune',), 'fixed', 'other arrays are trained', _ADAPTED),
    Rule(
        ('start',),
        'fixed',
        'the run has begun, with the parameters of then',
        'give the --start it began with, or another --workdir',
    ),
)
"""docs/training.md shows this table. The longest name that fits a setting decides; what none fits
is fixed."""


def table() -> str:
    """The rules as a table of Markdown."""
    lines = ['| setting | when a run goes on | why |', '|---|---|---|']
    for rule in RULES:
        settings = ', '.join(f'`{name}`' for name in rule.settings)
        remedy = f'; else {rule.remedy}'.replace('{workdir}', 'RUN') if rule.remedy else ''
        lines.append(f'| {settings} | {rule.rule} | {rule.why}{remedy} |')
    return '\n'.join(lines)


class Differences(NamedTuple):
    """Lines such as 'train.steps: 20 -> 40', by what they mean for a run that goes on."""

    may_change: list[str]
    by_content: list[str]


def rule_of(setting: str) -> Rule:
    """The rule for a setting by its dotted name."""
    fitting = [
        (len(name), i)
        for i, rule in enumerate(RULES)
        for name in rule.settings
        if re.match(re.escape(name).replace(r'\*', r'\d+') + r'(\.|$)', setting)
    ]
    return RULES[max(fitting)[1]] if fitting else Rule((setting,), 'fixed', '', _ANOTHER)


def differences(saved: Any, experiment: Experiment, workdir: Path) -> Differences:
    """What is set otherwise than in the record `saved` of an experiment; a setting that it lacks,
    since it was written before there was one, counts as its default.

    Raises UserError, with what to do, where something is fixed.
    """
    before, wanted = (_plain(e) for e in (from_dict(saved), experiment))
    by_rule: dict[str, list[str]] = {'may change': [], 'by content': [], 'fixed': []}
    remedies = set()
    wanted['model'] |= {name: before['model'][name] for name in by_tokenizer(experiment.model)}
    for line in difference(before, wanted):
        rule = rule_of(line.split(':')[0])
        by_rule[rule.rule].append(line)
        remedies |= {rule.remedy} - {''}
    if by_rule['fixed']:
        (remedy,) = remedies if len(remedies) == 1 else (_ANOTHER,)
        raise UserError(
            f'{workdir} holds another experiment; it differs in {"; ".join(by_rule["fixed"])}: '
            f'{remedy.format(workdir=workdir)}; or go on with the settings it began with'
        )
    return Differences(by_rule['may change'], by_rule['by content'])


def begun(workdir: Path) -> bool:
    """Whether a run has saved a checkpoint in `workdir`. What one left that died before does not
    bind the next."""
    return bool(present(workdir / 'checkpoints'))


def check_workdir(workdir: Path, experiment: Experiment) -> None:
    """Raise UserError when the run that has begun in `workdir` cannot go on as `experiment`, or
    another cannot begin with the run that it names. Costs nothing."""
    if not begun(workdir):
        return check_start(experiment)
    run = read_run(workdir)
    if run is not None:
        differences(run['experiment'], experiment, workdir)


def check_metadata(
    metadata: dict[str, Any], experiment: Experiment, tokenizer: str, workdir: Path
) -> None:
    """Raise UserError when the run in `workdir` cannot go on from the checkpoint with this metadata
    as `experiment`, with the tokenizer of this digest."""
    if metadata.get('format') != FORMAT:
        raise UserError(
            f'the checkpoints in {workdir} were saved by another version of llama_jax, from which '
            'a run cannot go on: use the version that saved them, or give another --workdir'
        )
    found = differences(metadata['experiment'], experiment, workdir)
    if metadata['tokenizer'] != tokenizer:
        learnt = experiment.data.tokenizer.path is None
        raise UserError(
            f'the tokenizer is not that of the run in {workdir}{_set_otherwise(found)}'
            f'{", or the text has changed from which it is learnt" if learnt else ""}: set '
            f'--data.tokenizer.path {workdir}, or give another --workdir'
        )
    taken, steps = metadata['step'], experiment.train.steps
    if taken > steps:
        raise UserError(
            f'the run in {workdir} has taken {taken} steps: set --train.steps {taken} or more, or '
            f'give another --workdir for a run of {steps}'
        )


def check_data(
    metadata: dict[str, Any], digest: str, experiment: Experiment, workdir: Path
) -> None:
    """Raise UserError unless the data of this digest is what the checkpoint's place is in."""
    if metadata['data'] != digest:
        found = differences(metadata['experiment'], experiment, workdir)
        raise UserError(
            f'the data is not what the run in {workdir} began with{_set_otherwise(found)}: its '
            f'documents, the names of their files or their split changed; restore them, or '
            f'{_ADAPTED.format(workdir=workdir)}'
        )


def _set_otherwise(found: Differences) -> str:
    return f' ({"; ".join(found.by_content)})' if found.by_content else ''


class Continuation(NamedTuple):
    """How a run goes on from a checkpoint."""

    ramp: Ramp | None
    """Of its learning rate, to be kept in the metadata of its checkpoints."""
    notes: list[str]


def continuation(metadata: dict[str, Any], experiment: Experiment, workdir: Path) -> Continuation:
    """How the learning rate goes on, and what to say of settings that changed.

    It depends on the checkpoint's metadata and on the settings alone, so that a run which is killed
    and started again has the same rates.
    """
    found = differences(metadata['experiment'], experiment, workdir)
    notes = [
        *(f'setting changed since the checkpoint: {line}' for line in found.may_change),
        *(f'setting changed, with the same content: {line}' for line in found.by_content),
    ]
    ramp = Ramp(**metadata['ramp']) if metadata.get('ramp') else None
    before, taken = from_dict(metadata['experiment']), metadata['step']
    config, steps = experiment.optimizer.schedule, experiment.train.steps
    if (before.optimizer.schedule, before.train.steps) == (config, steps):
        return Continuation(ramp, notes)
    old = schedule(before.optimizer.schedule, before.train.steps, ramp)
    # Whoever sets a lower rate means now; that of a shorter run is only a consequence.
    at_once = before.optimizer.schedule != config
    ramp = change(old, config, steps, taken=taken, at_once=at_once)
    new = schedule(config, steps, ramp)
    if ramp is not None:
        end = ramp.begin + ramp.steps
        there = float(new(end))
        way = (
            f'goes from {ramp.rate:.3g} after step {taken} in a straight line to {there:.3g} after'
        )
        if math.isclose(there, ramp.rate, rel_tol=1e-3):
            way = f'stays at {there:.3g} until'
        then = f', then goes by the schedule of {steps} steps' if end < steps else ''
        notes.append(f'the learning rate {way} step {end}{then}')
    elif taken < steps and float(new(taken)) < 0.999 * float(old(taken)):
        notes.append(
            f'the learning rate falls from {float(old(taken)):.3g} to {float(new(taken)):.3g} '
            f'after step {taken}, as it is set now'
        )
    return Continuation(ramp, notes)


def ramp_record(ramp: Ramp | None) -> dict[str, Any] | None:
    """A ramp for the metadata of a checkpoint."""
    return dataclasses.asdict(ramp) if ramp else None


def _plain(experiment: Experiment) -> dict[str, Any]:
    return json.loads(json.dumps(to_dict(experiment)))

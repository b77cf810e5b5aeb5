"""Proof, before the first step, that arms differ in what is compared and in nothing else.

Settings are compared field by field; what follows from them is computed as in training and compared
as well: the tokenizer, the order of documents, the initial weights, the budget.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import mesh as meshes
from llama_jax import trees
from llama_jax.compare.budget import Budget, Text, budget, flops, last_step, tokens
from llama_jax.compare.grid import Arm, Grid, allowed, check_names, check_steps
from llama_jax.compare.tune import FIELD as PEAK
from llama_jax.data import order
from llama_jax.data.config import DataConfig
from llama_jax.data.load_tokenizer import check as check_tokenizer
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.recipe import blocks_of
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.evaluate import suite as suites
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params
from llama_jax.objectives.base import Objective, backbone
from llama_jax.train import experiment as experiments
from llama_jax.train import teacher
from llama_jax.train.checkpoint import checksum, difference
from llama_jax.train.code import evaluation_code, training_code
from llama_jax.train.experiment import Experiment, to_dict
from llama_jax.train.plain import to_plain
from llama_jax.train.step import initial_params

ORDER = 4096
"""Documents at the start of training whose order is compared; of a small corpus two epochs."""

EVALUATION_CODE = 'evaluation code'
TRAINING_CODE = 'training code'
OF_FILES = ('tokenizer', 'documents', 'document order', 'initial weights')
"""How names begin, in what is held fixed, of what follows from files beside settings and code."""


@dataclass(frozen=True)
class Proof:
    """What the check found."""

    held_fixed: dict[str, Any]
    """Name to value or hash, the same for all arms."""
    budget: list[Budget]


def check(grid: Grid, say: Callable[[str], None] = lambda text: None) -> Proof:
    """Raise UserError for a grid whose arms differ in more than `grid.may_differ`.

    `say` gets a line before what takes a while.
    """
    check_names(grid)
    check_steps(grid)
    _check_fields(grid)
    _check_seeds(grid)
    for arm in grid.arms:
        with _named(arm):
            _check_settings(arm.experiment)
            suites.check(grid.suite, arm.experiment)
    held: dict[str, Any] = _matched(grid)
    held |= _settings(grid)
    held['evaluation suite'] = _hash(to_plain(grid.suite))
    held[EVALUATION_CODE] = evaluation_code()
    held[TRAINING_CODE] = training_code()

    say('comparing tokenizer and order of documents')
    text = functools.cache(text_of)
    held['tokenizer'] = _same(grid, 'tokenizer', lambda x: text(x.data).tokenizer.digest)
    for arm in grid.arms:
        with _named(arm):
            tokenizer = text(arm.experiment.data).tokenizer
            teacher.check(experiments.resolved(arm.experiment, tokenizer.vocab_size), tokenizer)
            suites.check_tasks(grid.suite, arm.experiment, tokenizer)
            suites.check_texts(grid.suite, arm.experiment)
    held['documents'] = _same(grid, 'documents', lambda x: text(x.data).corpus.digest)
    for seed in range(grid.seeds):
        if not allowed('randomness.data', grid.may_differ):
            held[f'document order, seed {seed}'] = _same(
                grid, 'order of documents', functools.partial(_order, text, seed)
            )
    say('comparing initial weights')
    held |= _initial_weights(grid)
    rows = []
    for arm in grid.arms:
        say(f'counting a sample of batches: {arm.name}')
        with _named(arm):
            first = replace(arm.experiment, seed=0)
            rows.append(budget(replace(arm, experiment=first), text(first.data)))
    if grid.match == 'text':
        held['text seen'] = _same_text(grid, rows)
    return Proof(held, rows)


def resolved(grid: Grid) -> Grid:
    """The grid with models for the tokenizers of its arms, which may leave `model.vocab` to them.

    Raises UserError for settings that do not fit each other, before a tokenizer is trained.
    """
    check_names(grid)
    _check_fields(grid)
    for arm in grid.arms:
        with _named(arm):
            _check_settings(arm.experiment)
            check_tokenizer(arm.experiment.data.tokenizer, rows=arm.experiment.model.vocab)
    tokenizer = functools.cache(load_tokenizer)
    arms = []
    for arm in grid.arms:
        with _named(arm):
            vocab_size = tokenizer(arm.experiment.data).vocab_size
            experiment = experiments.resolved(arm.experiment, vocab_size)
        arms.append(replace(arm, experiment=experiment))
    return replace(grid, arms=tuple(arms))


def _check_fields(grid: Grid) -> None:
    """Every arm against the first."""
    first, *others = grid.arms
    may_differ = (*grid.may_differ, 'seed')
    for arm in others:
        lines = difference(to_dict(first.experiment), to_dict(arm.experiment))
        unfair = [line for line in lines if not allowed(line.split(':')[0], may_differ)]
        if unfair:
            raise UserError(
                f'{grid.name} is no fair comparison: the arms {first.name} and {arm.name} differ '
                f'in {"; ".join(unfair)}; make them equal, or add what is compared to may_differ '
                f'({", ".join(grid.may_differ)})'
            )


def _check_seeds(grid: Grid) -> None:
    """Seeds that change nothing would be counted as independent runs."""
    for arm in grid.arms:
        own = asdict(arm.experiment.randomness)
        if None not in own.values() and (grid.seeds > 1 or grid.again):
            raise UserError(
                f'arm {arm.name}: randomness.{", randomness.".join(own)} are all given, so that '
                'every seed is the same run: leave one of them to the seed, or give --seeds 1 '
                '--aa False'
            )


def _matched(grid: Grid) -> dict[str, Any]:
    """The budget that all arms have alike, whatever may differ: of text it is seen later."""
    if grid.match == 'tokens':
        return {'tokens': _same(grid, 'token budget', tokens)}
    if grid.match == 'flops':
        goal = flops(grid.arms[0].experiment)
        for arm in grid.arms:
            found = flops(arm.experiment)
            _within_a_step(grid, arm, 'FLOPs', found, goal, step=last_step(arm.experiment))
        return {'FLOPs': f'{goal:.4g}, to the nearest step'}
    return {}


def _same_text(grid: Grid, rows: list[Budget]) -> str:
    """The tokens of raw text that each arm reads."""
    for arm, row in zip(grid.arms, rows, strict=True):
        step = row.text_seen / arm.experiment.train.steps
        _within_a_step(grid, arm, 'tokens of text', row.text_seen, rows[0].text_seen, step=step)
    return f'{rows[0].text_seen:,} tokens, to the nearest step'


def _within_a_step(
    grid: Grid, arm: Arm, what: str, found: float, goal: float, *, step: float
) -> None:
    # Steps are whole; a little more, for text is measured in a sample.
    if abs(found - goal) > 0.6 * step:
        raise UserError(
            f'{grid.name} is no fair comparison: the arm {arm.name} has {found:,.4g} {what}, the '
            f'arm {grid.arms[0].name} {goal:,.4g}: set --match {grid.match}, which changes its '
            'steps, and leave its steps to it'
        )


def _check_settings(experiment: Experiment) -> None:
    # On one device: whether the mesh fits is seen where the devices are, when a run begins.
    experiments.check(replace(experiment, mesh=MeshConfig()), _one_device())


def _same(grid: Grid, what: str, of: Callable[[Experiment], Any]) -> Any:
    """What every arm has alike. Raises UserError where it is not the same."""
    first, *others = grid.arms
    with _named(first):
        value = of(first.experiment)
    for arm in others:
        with _named(arm):
            other = of(arm.experiment)
        if other != value:
            raise UserError(
                f'{grid.name} is no fair comparison: the arms {first.name} and {arm.name} differ '
                f'in the {what} ({_short(value)} and {_short(other)}), which is the same in every '
                'comparison'
            )
    return value


def _settings(grid: Grid) -> dict[str, Any]:
    """Settings that readers ask for, and a hash of all that are the same."""
    first = grid.arms[0].experiment
    plain = to_dict(first)
    schedule = first.optimizer.schedule
    optimizer = dict(plain['optimizer'])
    kind = optimizer.pop('class')
    del optimizer['schedule']
    for name in [x for x in optimizer if allowed(f'optimizer.{x}', grid.may_differ)]:
        del optimizer[name]
    warm_up = {
        arm.experiment.optimizer.schedule.warmup(arm.experiment.train.steps) for arm in grid.arms
    }
    values = {
        ('train.batch', 'train.seq_len'): (
            'tokens per step',
            first.train.batch * first.train.seq_len,
        ),
        ('optimizer',): ('optimizer', f'{kind} {json.dumps(optimizer)}'),
        ('optimizer.schedule',): (
            'schedule',
            ', '.join(
                [
                    schedule.kind,
                    # Where each arm has its own it stands with the arm.
                    *([] if allowed(PEAK, grid.may_differ) else [f'peak {schedule.peak:g}']),
                    # By FLOPs each arm has as many as its steps are.
                    *([f'{min(warm_up)} steps of warm-up'] if len(warm_up) == 1 else []),
                ]
            ),
        ),
        ('compute.precision',): ('precision', first.compute.precision),
    }
    held = {
        name: value
        for fields, (name, value) in values.items()
        if not any(allowed(field, grid.may_differ) for field in fields)
    }
    flat = {path: value for path, value in _leaves(plain) if not allowed(path, grid.may_differ)}
    flat.pop('seed', None)
    return {**held, 'settings': _hash(flat)}


def _leaves(plain: Any, path: str = '') -> Iterable[tuple[str, Any]]:
    if not isinstance(plain, dict):
        yield path, plain
        return
    for key, value in plain.items():
        yield from _leaves(value, f'{path}.{key}'.lstrip('.'))


def text_of(data: DataConfig) -> Text:
    """The training text of a configuration."""
    return Text(open_sources(data, 'train'), load_tokenizer(data))


def _order(text: Callable[[DataConfig], Text], seed: int, experiment: Experiment) -> str:
    data, seq_len = text(experiment.data), experiment.train.seq_len
    stream = order.Stream(
        [blocks_of(texts, seq_len) for texts in data.texts],
        data.corpus.weights,
        seed=replace(experiment, seed=seed).seed_of('data'),
        share=experiment.data.share,
    )
    blocks = min(ORDER, 2 * sum(len(source) for source in stream.sources))
    return _hash(list(itertools.islice(stream, blocks)))


def _initial_weights(grid: Grid) -> dict[str, str]:
    """Checksums of the initial backbone under every seed: the same for all arms of one shape."""
    held: dict[str, str] = {}
    if allowed('randomness.init', grid.may_differ):
        return held
    programs: dict[str, Any] = {}
    groups: dict[str, list[Arm]] = {}
    for arm in grid.arms:
        groups.setdefault(_shape(arm.experiment), []).append(arm)
    for arms in groups.values():
        names = '' if len(groups) == 1 else f' of {", ".join(arm.name for arm in arms)}'
        for seed in range(grid.seeds):
            held[f'initial weights{names}, seed {seed}'] = _same(
                replace(grid, arms=tuple(arms)),
                f'initial weights under seed {seed}',
                functools.partial(_weights, programs, seed),
            )
    return held


def _shape(experiment: Experiment) -> str:
    """Names, shapes and types of the parameters of the backbone."""
    abstract = jax.eval_shape(lambda: _initial(experiment.model, experiment.objective, 0))
    leaves = trees.named(abstract)
    return repr([(name, leaf.shape, str(leaf.dtype)) for name, leaf in leaves])


def _weights(programs: dict[str, Any], seed: int, experiment: Experiment) -> str:
    """Checksum of the initial backbone.

    `programs` keeps what is compiled: most arms make the backbone by a program of the same text.
    """
    model, objective = experiment.model, experiment.objective
    lowered = jax.jit(lambda seed: _initial(model, objective, seed)).lower(seed)
    text = lowered.as_text()
    if text not in programs:
        programs[text] = lowered.compile()
    return f'{checksum(programs[text](replace(experiment, seed=seed).seed_of("init"))):08x}'


def _initial(model: ModelConfig, objective: Objective, seed: int | jax.Array) -> Params:
    """The backbone that training begins with (train/step.py), its objective's parameters aside."""
    init_key, _ = jax.random.split(jax.random.key(seed))
    return backbone(initial_params(model, objective, init_key))


def _one_device() -> Mesh:
    return meshes.make(MeshConfig(), jax.devices()[:1])


@contextlib.contextmanager
def _named(arm: Arm) -> Iterator[None]:
    """Says in a UserError which arm it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f'arm {arm.name}: {error}') from None


def _short(value: Any) -> str:
    text = f'{value:,}' if isinstance(value, int) else str(value)
    return text if len(text) <= 20 else text[:12]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""`python -m experiments.evaluate --tasks` and `--lm-eval`: tasks put to a model, or to two."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from configs import tasks as ready
from experiments import models
from llama_jax.convert import pretrained
from llama_jax.errors import UserError
from llama_jax.evaluate import ask, task
from llama_jax.evaluate.ask import HEADLINE, LOWER, Outcome
from llama_jax.evaluate.classifier import Classifier
from llama_jax.evaluate.subject import Subject
from llama_jax.evaluate.task import Loaded
from llama_jax.model.config import Compute
from llama_jax.objectives.classify import Classification
from llama_jax.train import restore
from llama_jax.train.records import read_run, write_atomically
from llama_jax.train.restore import check_checkpoint, experiment_of, named


@dataclass(frozen=True)
class Asking:
    """How tasks are put; all of it is of --tasks."""

    shots: int | None = None
    """Examples in front of each item, instead of what the task says."""
    shot_seeds: int | None = None
    """So many draws of them."""
    limit: int | None = None
    """The first so many items alone."""
    truncate: bool = False
    """Leave out the beginning of what is longer than the context, and count it."""
    seed: int = 0
    """Of the shots and of the intervals."""


def subject_of(name: str, mesh: Mesh, compute: Compute, what: str) -> Subject:
    """The model that is measured: a run, or weights of others."""
    classifier = None
    if read_run(named(name, what).workdir) is not None:
        model = models.from_run(name, mesh, what)
        if isinstance(experiment_of(named(name, what).workdir).objective, Classification):
            classifier = Classifier(restore.load(name, mesh, what=what), mesh)
    else:
        model = models.from_weights(name, mesh, what)
    return Subject(
        model.name if model.step is None else f'{model.name}, step {model.step}',
        model.programs(mesh, compute),
        model.vocabulary,
        model.begin,
        model.chat,
        classifier,
        model.prompts,
    )


def check_model(name: str, what: str) -> None:
    """Raise UserError unless there is a model of that name; reads none of its numbers."""
    if read_run(named(name, what).workdir) is not None:
        check_checkpoint(name, what)
    else:
        pretrained.find(name, what)


def loaded(names: Sequence[str], asking: Asking) -> list[Loaded]:
    """The tasks that are named, by file or as one of configs/tasks.py, with what `asking` says."""
    found = []
    changes = {
        name: value
        for name in ('shots', 'shot_seeds', 'limit')
        if (value := getattr(asking, name)) is not None
    }
    for name in names:
        path = Path(name)
        if path.suffix not in ('.toml', '.jsonl', '.ndjson'):
            path = ready.made(name)
        found.append(task.load(path, **changes))
    for name in changes:
        if found and not any(task.has(one.task.kind, name) for one in found):
            raise UserError(
                f'--{name.replace("_", "-")} has no effect on tasks of kind {found[0].task.kind}: '
                'leave it out'
            )
    twice = [one.task.name for one in found]
    for name in twice:
        if twice.count(name) > 1:
            raise UserError(f'two tasks are called {name}: give one of them another name')
    return found


def run(
    subject: Subject,
    other: Callable[[], Subject] | None,
    tasks: Sequence[Loaded],
    asking: Asking,
    output: Path | None,
) -> dict[str, Any]:
    """Put every task to the model, and to another one; print, and write what came of it."""
    begin = time.perf_counter()
    outcomes = [_asked(subject, one, asking) for one in tasks]
    result: dict[str, Any] = {'model': subject.name, 'seed': asking.seed, 'tasks': {}}
    for one, outcome in zip(tasks, outcomes, strict=True):
        result['tasks'][one.task.name] = outcome.result(seed=asking.seed)
    if other is not None:
        against = other()
        result['against'] = {'model': against.name, 'tasks': {}}
        for one, outcome in zip(tasks, outcomes, strict=True):
            theirs = _asked(against, one, asking)
            result['against']['tasks'][one.task.name] = {
                **theirs.result(seed=asking.seed),
                'difference': outcome.against(theirs, seed=asking.seed),
            }
            if output is not None:
                _write_examples(_beside(output, one.task.name, 'against'), theirs)
    result['seconds'] = time.perf_counter() - begin
    print('\n'.join(table(result)))
    if output is not None:
        for one, outcome in zip(tasks, outcomes, strict=True):
            _write_examples(_beside(output, one.task.name), outcome)
        write_atomically(output, json.dumps(result, indent=1, ensure_ascii=False))
        print(f'{output}, and the items beside it: {_beside(output, "TASK").name}')
    return result


def lm_eval_tasks(directory: str) -> Path:
    """The directory of YAML files; `local`: the suite of configs/tasks.py."""
    path = ready.lm_eval_suite() if directory == 'local' else Path(directory)
    if not any(path.rglob('*.yaml')):
        raise UserError(f'--lm-eval {directory}: there is no .yaml file of a task in {path}')
    return path


def run_lm_eval(subject: Subject, directory: Path, asking: Asking, output: Path | None) -> None:
    """Every task of a directory, by lm-eval; its own table is printed."""
    from llama_jax.evaluate import harness

    result = harness.evaluate(
        harness.HarnessLM(subject),
        directory,
        shots=asking.shots,
        limit=asking.limit,
        seed=asking.seed,
    )
    print(harness.table(result))
    if output is not None:
        samples = result.pop('samples')
        for name, lines in samples.items():
            text = ''.join(json.dumps(x, ensure_ascii=False, default=str) + '\n' for x in lines)
            write_atomically(_beside(output, name), text)
        write_atomically(output, json.dumps(result, indent=1, ensure_ascii=False, default=str))
        print(output)


def _asked(subject: Subject, one: Loaded, asking: Asking) -> Outcome:
    told = [0, time.perf_counter()]

    def tell(n: int) -> None:
        told[0] += n
        if time.perf_counter() - told[1] > 10:
            told[1] = time.perf_counter()
            print(f'{one.task.name}: {told[0]:,} tokens', file=sys.stderr, flush=True)

    return ask.ask(subject, one, seed=asking.seed, truncate=asking.truncate, tell=tell)


def _beside(output: Path, name: str, of: str = '') -> Path:
    """The file of the items of a task."""
    middle = f'-{of}' if of else ''
    return output.with_name(f'{output.stem}{middle}-{name}.jsonl')


def _write_examples(path: Path, outcome: Outcome) -> None:
    lines = (json.dumps(example, ensure_ascii=False) + '\n' for example in outcome.examples)
    write_atomically(path, ''.join(lines))


def table(result: dict[str, Any]) -> Iterator[str]:
    """A block for each task: every metric with its standard error and interval, and how much this
    model is above the other."""
    for name, one in result['tasks'].items():
        shots = ''
        if 'shots' in one:
            seeds = f', {one["shot_seeds"]} draws' if one['shots'] else ''
            shots = f', {one["shots"]} shots{seeds}'
        cut = f', {one["truncated"]} cut' if one.get('truncated') else ''
        chance = f', chance {one["chance"]:.3f}' if 'chance' in one else ''
        yield f'{name}: {result["model"]}, {one["items"]} items{shots}{cut}{chance}'
        difference: dict[str, Any] = {}
        if 'against' in result:
            difference = result['against']['tasks'][name]['difference']
        first = HEADLINE[one['kind']]
        for metric, found in sorted(one['metrics'].items(), key=lambda item: item[0] != first):
            yield '  {:<16}{}{}'.format(
                metric, _shown(found), ', lower is better' * (metric in LOWER)
            )
            if metric in difference:
                yield '    {:<14}{}'.format('difference', _shown(difference[metric], signed=True))
        for label, found in one.get('report', {}).get('classes', {}).items():
            yield (
                f'  {label:<16}precision {found["precision"]:.3f}, recall {found["recall"]:.3f}, '
                f'F1 {found["f1"]:.3f}, n = {found["n"]}'
            )
    if 'against' in result:
        yield f'difference: above {result["against"]["model"]} on the same items'


def _shown(found: dict[str, Any], *, signed: bool = False) -> str:
    sign = '+' if signed else ''
    return '{:{sign}7.4f}  se {:.4f}  [{:{sign}.4f}, {:{sign}.4f}]'.format(
        *(found[name] for name in ('value', 'se', 'low', 'high')), sign=sign
    )

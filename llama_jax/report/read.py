"""Reads the records of a run, whole or not: a run may be young, killed, or not finite."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError

Line = dict[str, Any]


@dataclass(frozen=True)
class RunRecords:
    """The records of one run, lines ordered by step."""

    name: str
    facts: Line
    """run.json"""
    baselines: Line
    """baselines.json; empty when there is none."""
    train: list[Line] = field(default_factory=list)
    validation: list[Line] = field(default_factory=list)
    light: list[Line] = field(default_factory=list)
    """The metrics common to all objectives, measured during the training."""
    samples: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    tasks: Line = field(default_factory=dict)
    """tasks.json, of `experiments.evaluate --tasks`; empty when there is none."""
    problems: list[str] = field(default_factory=list)
    """Sentences about what could not be read."""

    @property
    def likelihood_unit(self) -> str:
        """The unit of its likelihood, which says where that is a bound."""
        bound = any(line.get('likelihood') == 'bound' for line in self.validation[-1:])
        return f'bits per byte{", upper bound" if bound else ""}'


def read(run_dir: Path) -> RunRecords:
    """The records in `run_dir`. Raises UserError when no run is there."""
    facts = read_object(run_dir / 'run.json')
    if facts is None:
        what = 'holds no run (no run.json)' if run_dir.is_dir() else 'is no directory'
        raise UserError(f'{run_dir} {what}: name the --workdir of a training run')
    problems: list[str] = []
    beside: dict[str, Line] = {}
    for name in ('baselines', 'tasks'):
        try:
            beside[name] = read_object(run_dir / f'{name}.json') or {}
        except UserError as error:
            beside[name] = {}
            problems.append(str(error))
    lines, unreadable = _read_lines(run_dir / 'metrics.jsonl')
    if unreadable:
        are = 'line was' if unreadable == 1 else 'lines were'
        problems.append(f'{unreadable} unreadable {are} left out of metrics.jsonl.')
    return RunRecords(
        name=str(facts.get('name') or run_dir.resolve().name),
        facts=facts,
        baselines=beside['baselines'],
        tasks=beside['tasks'],
        train=_by_step(lines, 'train'),
        validation=_by_step(lines, 'validation'),
        light=_by_step(lines, 'light'),
        samples=_by_step(lines, 'sample', 'prompt'),
        events=sorted((x for x in lines if x['kind'] == 'event'), key=lambda x: x['step']),
        problems=problems,
    )


def number(line: Line, *names: str) -> float | None:
    """The finite number under nested `names`; None where there is none."""
    value = inside(line, *names)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def inside(value: Any, *names: str) -> Any:
    """What stands under nested `names`; None where there is nothing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def last(lines: list[Line], name: str) -> float | None:
    """The last finite number `name` in `lines`."""
    return next(
        (x for x in (number(line, name) for line in reversed(lines)) if x is not None), None
    )


def _by_step(lines: list[Line], kind: str, *names: str) -> list[Line]:
    """Lines of one kind; of several for one step, taken again after a kill, the newest."""
    newest = {
        (line['step'], *(str(line.get(name)) for name in names)): line
        for line in lines
        if line['kind'] == kind
    }
    return sorted(newest.values(), key=lambda line: line['step'])


def _read_lines(path: Path) -> tuple[list[Line], int]:
    """The lines with a kind and a step, and how many others there are."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): look at the file') from error
    lines, unreadable = [], 0
    # Not str.splitlines: it would cut a sample at U+2028, which JSON leaves as it is.
    for text in data.split(b'\n'):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if (
            isinstance(line, dict)
            and isinstance(line.get('kind'), str)
            and number(line, 'step') is not None
        ):
            lines.append(line)
        else:
            unreadable += 1
    return lines, unreadable


def read_object(path: Path) -> Line | None:
    """The JSON object in a file, None when the file is not there."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): look at the file') from error
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f'{path} is no JSON object: restore it, or run the training command again')
    return value

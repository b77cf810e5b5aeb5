"""The baselines of a comparison, as its records have them: what an arm has to surpass."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.report.read import Line, inside, number, read_object

FOLDER = 'baselines'
"""WORKDIR/baselines/NAME/seed-K/evaluation.json."""
COUNTS = 'counts'
"""NAME of those that are made of the texts alone, whose evaluation.json has a row for each; any
other is a backbone that was not trained."""


@dataclass(frozen=True)
class Baseline:
    """A row below the arms."""

    name: str
    metrics: Sequence[Line]
    """One for each seed."""
    arms: frozenset[str] | None = None
    """Of which arms it is the baseline; None: of all."""
    examples: frozenset[str] = frozenset()
    """Hashes of the texts that its seeds were measured on."""

    def value(self, metric: str) -> float | None:
        """The mean over its seeds."""
        found = [
            x for x in (number(line, metric, 'value') for line in self.metrics) if x is not None
        ]
        return statistics.fmean(found) if found else None

    def applies(self, arm: str) -> bool:
        return self.arms is None or arm in self.arms


def read_baselines(workdir: Path, facts: Line, problems: list[str]) -> list[Baseline]:
    """All that are there."""
    found: list[Baseline] = []
    folder = workdir / FOLDER
    planned = facts.get(FOLDER)
    for name, arms in planned.items() if isinstance(planned, dict) else ():
        results = []
        for path in sorted(folder.glob(f'{name}/seed-*/evaluation.json')):
            try:
                results.append(read_object(path) or {})
            except UserError as error:
                problems.append(f'{FOLDER}/{name}: {error}')
        hashes = (inside(result, 'examples') for result in results)
        of = frozenset(x for x in hashes if isinstance(x, str))
        if name == COUNTS:
            rows = inside(results[0], 'rows') if results else None
            found += [
                Baseline(str(row), [line], examples=of)
                for row, line in (rows or {}).items()
                if line is not None
            ]
        elif results:
            lines = [x for x in (inside(result, 'metrics') for result in results) if x]
            found.append(Baseline(name, lines, frozenset(arms), of))
    return found

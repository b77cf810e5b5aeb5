"""What a model was asked by `experiments.evaluate --tasks`, with intervals."""

from __future__ import annotations

from typing import Any

from llama_jax.report.read import Line, RunRecords, inside, number
from llama_jax.report.tables import NOT_APPLICABLE, Cell, Row, Table
from llama_jax.report.text import escape


def section(run: RunRecords) -> str:
    """A table for each task of tasks.json; '' where there is none."""
    tasks = inside(run.tasks, 'tasks')
    if not isinstance(tasks, dict) or not tasks:
        return ''
    cards = ''.join(
        f'<div class="card">{_table(run.tasks, str(name), task).html()}</div>'
        for name, task in tasks.items()
        if isinstance(task, dict)
    )
    against = inside(run.tasks, 'against', 'model')
    other = f' The difference is above {escape(against)} on the same items.' if against else ''
    return (
        f'<h2>Evaluation</h2><div class="tables">{cards}</div><p class="note">Of '
        f'{escape(inside(run.tasks, "model"))}; in brackets the 95% interval, bootstrapped over '
        f'the items.{other}</p>'
    )


def _table(tasks: Line, name: str, task: Line) -> Table:
    metrics = inside(task, 'metrics')
    theirs = inside(tasks, 'against', 'tasks', name)
    rows = []
    for metric, found in metrics.items() if isinstance(metrics, dict) else ():
        cells = [_shown(found)]
        if theirs is not None:
            cells += [_shown(inside(theirs, part, metric)) for part in ('metrics', 'difference')]
        rows.append(Row(str(metric), [Cell(cell) for cell in cells]))
    chance = number(task, 'chance')
    if chance is not None:
        blank = [Cell('')] * (len(rows[0].cells) - 1) if rows else []
        rows.append(Row('chance', [Cell(f'{chance:.3f}'), *blank], beside=True))
    items, shots = inside(task, 'items'), inside(task, 'shots')
    about = f'{name}, {items} items{f", {shots} shots" if shots else ""}'
    other = str(inside(tasks, 'against', 'model'))
    return Table([about, 'this run', *([other, 'difference'] if theirs is not None else [])], rows)


def _shown(found: Any) -> str:
    value, low, high = (number(found or {}, key) for key in ('value', 'low', 'high'))
    if value is None:
        return NOT_APPLICABLE
    return f'{value:.3f}' if low is None else f'{value:.3f} [{low:.3f}, {high:.3f}]'

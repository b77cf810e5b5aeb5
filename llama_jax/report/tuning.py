"""What a run changed of the model that it began with: figures and texts, before and after."""

from __future__ import annotations

from collections.abc import Iterable

from llama_jax.report.curves import series, smoothed, tokens
from llama_jax.report.draw import htmls
from llama_jax.report.picture import Curve, Picture
from llama_jax.report.read import Line, RunRecords, inside, number
from llama_jax.report.tables import NOT_YET, Cell, Row, Table
from llama_jax.report.text import escape, significant

_OF_EVERY_RUN = {
    *('kind', 'step', 'tokens', 'flops', 'seconds', 'loss', 'nll', 'weight', 'grad_norm'),
    *('learning_rate', 'skipped', 'tokens_per_second', 'mfu', 'seconds_waiting', 'bytes'),
    *('epochs', 'documents', 'share', 'bits_per_byte', 'bits_per_byte_se'),
}
"""Fields of a record that stand elsewhere on the page."""
_SHOWN = 6
"""Texts that are shown without a fold."""


def measured(run: RunRecords) -> list[str]:
    """Names of what the objective measures besides its loss, such as the accuracy; those of single
    sets aside."""
    lines = [*run.train, *run.validation]
    names = dict.fromkeys(name for line in lines for name in line)
    return [
        name
        for name in names
        if name.split('/')[0] not in _OF_EVERY_RUN
        and name.rpartition('/')[0] not in names
        and any(number(line, name) is not None for line in lines)
    ]


def charts(run: RunRecords) -> str:
    """Each of these against tokens."""
    return htmls(_measured(run, name) for name in measured(run))


def _measured(run: RunRecords, name: str) -> Picture:
    held_out = series(run.validation, 'tokens', name)
    return Picture(
        f'measured-{name}',
        name.replace('_', ' ').capitalize(),
        'per unit of loss',
        tokens(run),
        [
            *smoothed(series(run.train, 'tokens', name), 'training'),
            Curve('validation', held_out, 'held-out', dots=len(held_out) <= 60),
        ],
        whole=False,
    )


def section(run: RunRecords) -> str:
    """Figures of the validations before the first step and after the last, and what was written to
    the same prompts; '' for a run that was not validated before its first step."""
    if not run.validation or run.validation[0]['step'] != 0 or run.validation[-1]['step'] == 0:
        return ''
    start = inside(run.facts, 'experiment', 'start')
    return (
        f'<h2>Before and after</h2><div class="tables"><div class="card">{_figures(run).html()}'
        f'</div></div><p class="note">Of the held-out data, before the first step '
        f'({escape(start)}) and after the last one; the best is that of the lowest loss, or of the '
        f'fewest bits per byte.</p>{_texts(run.samples)}'
    )


def _figures(run: RunRecords) -> Table:
    first, newest = run.validation[0], run.validation[-1]
    by = 'bits_per_byte' if number(newest, 'bits_per_byte') is not None else 'loss'
    known = [line for line in run.validation[1:] if number(line, by) is not None]
    best = min(known, key=lambda line: line[by], default={})
    rows = []
    for name in ('loss', 'bits_per_byte', *measured(run)):
        values = [number(line, name) for line in (first, newest, best)]
        if any(value is not None for value in values):
            cells = [Cell(NOT_YET if x is None else significant(x)) for x in values]
            rows.append(Row(name.replace('_', ' '), cells))
    head = ['', 'before', f'after step {newest["step"]:,}']
    return Table([*head, f'best, step {best["step"]:,}' if best else 'best'], rows)


def _texts(samples: list[Line]) -> str:
    """What was written to each prompt before the first step and after the last."""
    steps = {line['step'] for line in samples}
    if 0 not in steps or len(steps) < 2:
        return ''
    last = max(steps)
    after = {line.get('prompt'): line for line in samples if line['step'] == last}
    both = [
        (line, after[line.get('prompt')])
        for line in samples
        if line['step'] == 0 and line.get('prompt') in after
    ]
    shown, folded = both[:_SHOWN], both[_SHOWN:]
    more = f'<details><summary>{len(folded)} more</summary>{_pairs(folded)}</details>'
    return f'{_pairs(shown)}{more if folded else ""}'


def _pairs(both: Iterable[tuple[Line, Line]]) -> str:
    blocks = []
    for before, after in both:
        rows = [('prompt', before.get('prompt')), ('before', before.get('text'))]
        rows.append(('after', after.get('text')))
        if after.get('reference') is not None:
            rows.append(('wanted', after['reference']))
        cells = ''.join(
            f'<tr><th>{name}</th><td><pre dir="auto">{escape(text or "")}</pre></td></tr>'
            for name, text in rows
        )
        blocks.append(f'<div class="card pair"><table>{cells}</table></div>')
    return ''.join(blocks)

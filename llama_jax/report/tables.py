"""Tables, once as HTML and once as Markdown, from the same cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.report.style import arm_style
from llama_jax.report.text import escape

NOT_APPLICABLE = 'n/a'
NOT_YET = '—'
"""What was not measured, but could be."""
_LONG = 30
"""Characters from which on a cell is broken into lines."""


@dataclass(frozen=True)
class Cell:
    """Text of a cell; `best` sets it in bold, `told` is what a pointer on it shows."""

    text: str
    best: bool = False
    told: str = ''


@dataclass(frozen=True)
class Row:
    """`arm` is the place of an arm in the grid, whose colour stands before the name."""

    name: str
    cells: Sequence[Cell]
    arm: int | None = None
    open: bool = False
    """True where the runs are not finished: the row is pale."""
    beside: bool = False
    """True of what is no arm: a baseline, or the noise floor."""


@dataclass(frozen=True)
class Table:
    """`head` names the column of names first, then one column for each cell of a row."""

    head: Sequence[str]
    rows: Sequence[Row]
    right: bool = True
    """Numbers stand on the right, text on the left."""
    code: bool = False
    """For hashes and commands."""

    def html(self) -> str:
        """An element that scrolls sideways where it is too wide."""
        side = 'right' if self.right else 'code' if self.code else ''
        first, *others = self.head
        head = f'<th>{escape(first)}</th>' + ''.join(
            f'<th{_classes(side if self.right else "")}>{escape(text)}</th>' for text in others
        )
        rows = ''.join(
            f'<tr{_classes("open" if row.open else "", "beside" if row.beside else "")}>'
            f'<th>{_swatch(row.arm)}{escape(row.name)}</th>'
            f'{"".join(_cell(cell, side) for cell in row.cells)}</tr>'
            for row in self.rows
        )
        return (
            f'<div class="scroll"><table class="data"><thead><tr>{head}</tr></thead>'
            f'<tbody>{rows}</tbody></table></div>'
        )

    def markdown(self) -> str:
        """A table of GitHub's Markdown, with a newline at its end."""
        rule = ['---', *(('---:' if self.right else '---') for _ in self.head[1:])]
        rows = [
            [markdown(row.name), *(_bold(markdown(c.text), c.best) for c in row.cells)]
            for row in self.rows
        ]
        lines = [[markdown(' '.join(x.split('\n'))) for x in self.head], rule, *rows]
        return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def markdown(text: str) -> str:
    """Any text as Markdown that shows it: no markup of it works, and no line of it ends."""
    marked = re.sub(r'([\\`*_\[\]#|~$])', r'\\\1', text)
    return ' '.join(escape(marked).replace('&quot;', '"').replace('&#x27;', "'").split())


def _cell(cell: Cell, side: str) -> str:
    text = f'<b>{escape(cell.text)}</b>' if cell.best else escape(cell.text)
    told = f' title="{escape(cell.told)}"' if cell.told else ''
    none = 'none' if cell.text in (NOT_APPLICABLE, NOT_YET) else ''
    wide = 'wide' if len(cell.text) > _LONG else ''
    return f'<td{_classes(side, none, wide)}{told}>{text}</td>'


def _classes(*names: str) -> str:
    told = ' '.join(filter(None, names))
    return f' class="{told}"' if told else ''


def _swatch(arm: int | None) -> str:
    return '' if arm is None else f'<i class="swatch {arm_style(arm)}"></i>'


def _bold(text: str, best: bool) -> str:
    return f'**{text}**' if best else text

"""Writes what comparisons found into a page: docs/directions.md.

usage: .venv/bin/python tools/directions.py RUNS [PAGE]

RUNS holds the working directory of each comparison under its own name (RUNS/star_graph). In the
page, what stands between `<!-- results GRID: METRIC ... -->` and `<!-- end -->` is replaced by the
tables of that comparison; where RUNS has none it is left as it is.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from llama_jax.errors import UserError
from llama_jax.evaluate.metrics import METRICS
from llama_jax.report import scores
from llama_jax.report.accounts import progress
from llama_jax.report.grid import GridRecords, read_grid
from llama_jax.report.judged import Judged
from llama_jax.report.read import last

PAGE = Path(__file__).parents[1] / 'docs' / 'directions.md'
BLOCK = re.compile(r'(<!-- results (\w+): ([\w ]+) -->\n).*?(<!-- end -->)', re.DOTALL)


def filled(page: str, runs: Path) -> str:
    """The page with the tables of all comparisons that are there and finished. Raises UserError for
    a metric that there is not, and for a comparison with runs that are not finished."""

    def block(found: re.Match[str]) -> str:
        begin, name, asked, end = found.groups()
        unknown = set(asked.split()) - {*METRICS}
        if unknown:
            raise UserError(f'{name}: no metric is called {min(unknown)!r}')
        if not (runs / name / 'grid.json').exists():
            return found[0]
        grid = read_grid(runs / name)
        is_open = [f'{arm.name} ({progress(arm)})' for arm in grid.arms if not arm.done]
        if is_open:
            raise UserError(f'{runs / name} is not finished: {", ".join(is_open)}')
        return f'{begin}{results(grid, tuple(asked.split()))}{end}'

    return BLOCK.sub(block, page)


def results(grid: GridRecords, metrics: tuple[str, ...]) -> str:
    """Scores, differences, and of each difference its p."""
    judged = Judged(grid)
    parts = [scores.scores(judged, metrics).markdown()]
    differences = scores.differences(judged, metrics)
    if differences is not None:
        parts.append(differences.markdown())
    said = [
        f'{METRICS[metric].label}: '
        + ', '.join(
            f'{arm} p {x.corrected:.2g} (n {x.seeds} seeds, {x.texts} texts)'
            for arm, x in found.items()
            if not math.isnan(x.corrected)
        )
        for metric in metrics
        if (found := judged.differences(metric))
    ]
    every = [run for arm in grid.arms for run in (*arm.runs, *arm.sweep, *arm.again)]
    seconds = [last(run.records.train, 'seconds') for run in every if run.records]
    minutes = sum(x for x in seconds if x is not None) / 60
    said.append(f'{len(every)} runs, {minutes:.0f} minutes of training')
    return '\n'.join(parts) + '\n' + '. '.join(said) + '.\n'


def main() -> None:
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    page = Path(sys.argv[2]) if len(sys.argv) == 3 else PAGE
    try:
        text = filled(page.read_text('utf-8'), Path(sys.argv[1]))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(1) from None
    page.write_text(text, 'utf-8')


if __name__ == '__main__':
    main()

"""The report of a comparison: one page, the same in Markdown, and its pictures as PNG files.

Made of the records alone: grid.json and the records of its runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_jax import installed
from llama_jax.report import accounts, difference_pictures, draw, scores
from llama_jax.report.grid import GridRecords, read_grid
from llama_jax.report.judged import Judged
from llama_jax.report.page import document
from llama_jax.report.picture import Picture
from llama_jax.report.pictures import sections
from llama_jax.report.style import COMPARISON_CSS, CSS
from llama_jax.report.tables import Table, markdown
from llama_jax.report.text import escape, visible
from llama_jax.train.records import write_atomically

FIGURES = 'figures'
_BOLD = (
    'Mean ± standard deviation over seeds. Bold: no arm is shown to be better, and it is shown to '
    'be better than some, by intervals of paired differences corrected (Holm) over all pairs of '
    'arms; where nothing is shown nothing is bold. ▽: not above a baseline, and never bold.'
)
_BELOW = (
    'Metrics in which the best arm is below one of its baselines: at this size and budget training '
    'has not helped in them, so that they are no headline. They rank arms by something else than '
    'what is learned.'
)
_NONE = ' In none of them is the best arm above every baseline.'
_UNMEASURED = ' The suite of this comparison measures none of them.'
_DIFFERENCES = (
    'Each arm less the first, on the same seeds and the same texts; in brackets the interval (95%, '
    'hierarchical bootstrap over seeds and documents, corrected by Holm over the arms). Bold: the '
    'interval leaves 0 out; that any bold one of a metric is false has a chance of 5%. What is '
    'smaller than the noise floor (the half-width of the interval, not corrected, of the first arm '
    'under other seeds less itself) may be seeds and texts alone.'
)


@dataclass(frozen=True)
class Fold:
    """A table that the page keeps closed."""

    title: str
    table: Table


@dataclass(frozen=True)
class Section:
    """A heading, what to know when reading, and what stands below it."""

    title: str
    note: str
    parts: Sequence[Table | Fold | Picture | str]
    """A string is a command line."""


def write(workdir: Path, judged: Judged | None = None) -> Path:
    """Write report.html, report.md and figures/*.png into `workdir`; returns the page's path.

    Reads the records of `workdir` unless they are given, judged. Raises UserError when no
    comparison is there.
    """
    judged = judged or Judged(read_grid(workdir))
    grid, parts = judged.grid, content(judged)
    pictures = [p for section in parts for p in section.parts if isinstance(p, Picture)]
    draw.write_pngs(workdir / FIGURES, pictures)
    write_atomically(workdir / 'report.md', text(grid, parts))
    path = workdir / 'report.html'
    write_atomically(path, page(grid, parts))
    return path


def content(judged: Judged) -> list[Section]:
    """All that the report tells, in order."""
    grid = judged.grid
    may_differ = grid.facts.get('may_differ')
    differ = ', '.join(map(str, may_differ)) if isinstance(may_differ, list) else 'not recorded'
    others = scores.measured(grid, scores.OTHERS)
    carried, rest = scores.headline(grid)
    about = '' if carried else _NONE if rest else _UNMEASURED
    geometry = scores.measured(grid, scores.GEOMETRY)
    differences = [
        table
        for metrics in (carried, rest, others)
        if metrics and (table := scores.differences(judged, metrics))
    ]
    seeds = Fold('Every seed, with 95% intervals over its examples', scores.intervals(judged))
    of_scores = [
        Section(
            'Common metrics',
            f'{_BOLD} These metrics apply to every objective.{about}',
            [*([scores.scores(judged, carried)] if carried else []), seeds],
        ),
        Section('Below a baseline', _BELOW, [scores.scores(judged, rest)] if rest else []),
        Section(
            'Metrics of some objectives',
            f'{_BOLD} n/a: the metric does not apply to the objective. A bound or a '
            'pseudo-likelihood is never bold beside an exact value. By: choices were weighed by '
            'it; the accuracy is that of the model asked so.',
            [scores.scores(judged, others)] if others else [],
        ),
        Section(
            'Differences',
            _DIFFERENCES,
            [*differences, *_difference_pictures(judged)] if differences else [],
        ),
        Section(
            'Win matrix',
            f'The share of the {len(scores.tasks(carried))} common tasks that the arm of the row '
            'wins over the arm of the column, by means over seeds. A task has one vote, however '
            'many metrics it has; a tie counts half. Differences say what is more than chance.',
            [scores.wins(grid, carried)] if carried else [],
        ),
        Section(
            'Geometry',
            'Alignment and uniformity describe representations and rank nothing: either alone is '
            'best where vectors are worthless.',
            [scores.scores(judged, geometry)] if geometry else [],
        ),
    ]
    return [
        *(section for section in of_scores if section.parts),
        *_rates(grid),
        *(Section(*section) for section in sections(grid)),
        Section(
            'Cost',
            'Means over the seeds of what was recorded; training time leaves out compilation and '
            'evaluation. Clipped: the share of recorded steps whose gradient was scaled down.',
            [accounts.cost(grid)],
        ),
        Section(
            'What was compared',
            f'Arms may differ in: {differ}.',
            [accounts.arms(grid), accounts.held_fixed(grid)],
        ),
        Section(
            'Budget',
            'As planned before the first step, but for the seconds of training. Text seen and '
            'unique tokens are of raw text; padding is the share of positions without text; '
            'documents cut are longer than a row.',
            [accounts.budget(grid)],
        ),
        Section(
            'To make it again',
            '',
            [
                accounts.command(grid.facts.get('command')),
                accounts.versions(grid),
                Fold('Every run', accounts.runs(grid)),
            ],
        ),
    ]


def _rates(grid: GridRecords) -> list[Section]:
    table, said = accounts.rates(grid), str(grid.facts.get('tuned') or '')
    note = (
        'Each arm at the rate of its lowest own held-out loss under the first seed. At the edge: '
        'no rate beyond was tried, and one there may be better for the arm.'
    )
    if table is not None:
        return [Section('Learning rates', note, [table])]
    return [Section('Learning rates', f'Chosen before: {said}.', [])] if said else []


def _difference_pictures(judged: Judged) -> list[Picture]:
    metrics = scores.measured(judged.grid, (*scores.HEADLINE, *scores.OTHERS))
    told = difference_pictures.one_a_task(metrics)
    pictures = [difference_pictures.floor(judged, metrics)]
    pictures += [difference_pictures.forest(judged, metric) for metric in told]
    return [picture for picture in pictures if not picture.empty]


def notes(grid: GridRecords) -> list[str]:
    """What a reader has to know first: that the grid is partial, and what could not be read."""
    runs = [run for _, run in grid.runs]
    done = sum(run.done for run in runs)
    told = []
    if done < len(runs) or not runs:
        open_arms = [f'{a.name} ({accounts.progress(a)})' for a in grid.arms if not a.done]
        told.append(
            f'This grid is not complete: {done} of {len(runs)} runs are finished. Tables of '
            f'metrics hold those; curves show all. Open: {", ".join(open_arms)}.'
        )
    told += accounts.absent(grid)
    return [*told, *accounts.code(grid), *accounts.fine_tuning(grid), *grid.problems]


def title(grid: GridRecords) -> str:
    """The title, which says where arms stand at rates that nobody chose for them."""
    tuned = grid.facts.get('tuning') or grid.facts.get('tuned')
    return grid.title if tuned or len(grid.arms) < 2 else f'{grid.title} (untuned)'


def lead(grid: GridRecords) -> str:
    """One line about the whole."""
    seeds = len({run.seed for _, run in grid.runs})
    started = str(grid.facts.get('started') or '')[:16].replace('T', ' ')
    told = [
        str(grid.facts.get('name') or ''),
        f'{len(grid.arms)} arms, {seeds} seed{"s" * (seeds != 1)}',
        str(grid.facts.get('device') or ''),
        started,
    ]
    return ' · '.join(filter(None, told))


def page(grid: GridRecords, parts: Sequence[Section]) -> str:
    """The report in HTML."""
    warnings = ''.join(f'<p class="warning">{escape(x)}</p>' for x in notes(grid))
    links = ''.join(
        f'<a href="#{_anchor(section.title)}">{escape(section.title)}</a>' for section in parts
    )
    return document(
        title(grid),
        CSS + COMPARISON_CSS,
        f"""<h1>{escape(title(grid))}</h1><p class="lead">{escape(lead(grid))}</p>
{warnings}
<nav>{links}</nav>
{''.join(map(_section, parts))}
<footer>Made from grid.json and the records of its runs alone;
<code>{installed.command('report')}</code> makes it again.</footer>""",
    )


def text(grid: GridRecords, parts: Sequence[Section]) -> str:
    """The report in Markdown; its pictures are the files in figures/."""
    blocks = [f'# {markdown(title(grid))}', markdown(lead(grid))]
    blocks += [f'> **Note.** {markdown(x)}' for x in notes(grid)]
    for section in parts:
        blocks.append(f'## {section.title}')
        blocks += [markdown(section.note)] * bool(section.note)
        images = []
        for part in section.parts:
            if isinstance(part, Table):
                blocks.append(part.markdown().rstrip())
            elif isinstance(part, Fold):
                blocks.append(f'**{part.title}**\n\n{part.table.markdown().rstrip()}')
            elif isinstance(part, str):
                blocks.append(_code_block(part))
            else:
                images.append(f'![{markdown(part.title)}]({FIGURES}/{part.name}.png)')
        blocks += ['\n'.join(images)] * bool(images)
    return '\n\n'.join(blocks) + '\n'


def _section(section: Section) -> str:
    note = f'<p class="soft">{escape(section.note)}</p>' if section.note else ''
    parts = ''.join(_part(part) for part in section.parts if not isinstance(part, Picture))
    figures = draw.htmls(part for part in section.parts if isinstance(part, Picture))
    charts = f'<div class="charts">{figures}</div>' if figures else ''
    anchor = _anchor(section.title)
    return f'<h2 id="{anchor}">{escape(section.title)}</h2>{note}{charts}{parts}\n'


def _part(part: Table | Fold | str) -> str:
    if isinstance(part, Fold):
        return (
            f'<details><summary>{escape(part.title)}</summary>'
            f'<div class="inner">{part.table.html()}</div></details>'
        )
    inner = part.html() if isinstance(part, Table) else f'<pre>{escape(part)}</pre>'
    return f'<div class="card">{inner}</div>'


def _anchor(title: str) -> str:
    return title.lower().replace(' ', '-')


def _code_block(line: str) -> str:
    """A fence longer than any in the line."""
    line, fence = visible(line), '```'
    while fence in line:
        fence += '`'
    return f'{fence}\n{line}\n{fence}'

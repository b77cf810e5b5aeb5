"""report.html: one file that needs nothing else, made of the records of a run."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

from llama_jax import installed
from llama_jax.report import curves, sets, tasks, tuning
from llama_jax.report.headline import headline
from llama_jax.report.read import Line, RunRecords, read
from llama_jax.report.style import CSS, SERIES_CSS, TABLE_CSS
from llama_jax.report.text import escape
from llama_jax.train.records import write_atomically

# Nothing may be loaded and nothing may run, whatever a sample says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run_dir: Path) -> Path:
    """Write report.html into the directory of a run, and return its path.

    Raises UserError when the directory holds no run.
    """
    path = run_dir / 'report.html'
    write_atomically(path, page(read(run_dir)))
    return path


def page(run: RunRecords) -> str:
    """The whole page in HTML."""
    problems = ''.join(f'<p class="warning">{escape(text)}</p>' for text in run.problems)
    return document(
        run.name,
        f'{CSS}{SERIES_CSS}{TABLE_CSS}',
        f"""{headline(run)}
{problems}
{tuning.section(run)}{tasks.section(run)}<h2>Learning</h2>
<div class="charts">{curves.learning(run)}{sets.by_set(run, curves.tokens(run))}{
            tuning.charts(run)
        }</div>
{_data(sets.tables(run))}<h2>Optimisation and speed</h2>
<div class="charts">{curves.training(run)}</div>
<h2>Samples</h2>
{_samples(run.samples)}
<h2>Events</h2>
{_events(run.events)}
<h2>Configuration</h2>
{_configuration(run.facts.get('experiment'))}
<h2>Provenance</h2>
{_provenance(run.facts)}
<footer>Made from run.json, metrics.jsonl, baselines.json and tasks.json alone;
<code>{installed.command('report')}</code> makes it again.</footer>""",
    )


def document(title: str, style: str, body: str) -> str:
    """A page that loads nothing and runs nothing. `body` is HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def _data(tables: str) -> str:
    return f'<h2>Data</h2>\n<div class="tables">{tables}</div>\n' if tables else ''


def _samples(samples: list[Line]) -> str:
    """The newest first and open."""
    if not samples:
        return '<p class="soft">No samples recorded yet.</p>'
    blocks: list[str] = []
    for step, group in itertools.groupby(reversed(samples), key=lambda line: line['step']):
        texts = list(group)[::-1]
        count = f'{len(texts)} sample{"s" * (len(texts) > 1)}'
        blocks.append(
            f'<details{"" if blocks else " open"}><summary>Step {step:,} <span>{count}</span>'
            f'</summary>{"".join(map(_sample, texts))}</details>'
        )
    note = '<p class="note">The prompt is marked; what follows, the model wrote.</p>'
    return ''.join(blocks) + note


def _sample(line: Line) -> str:
    prompt, text = (line.get(name) or '' for name in ('prompt', 'text'))
    return f'<pre dir="auto"><b>{escape(prompt)}</b>{escape(text)}</pre>'


def _events(events: list[Line]) -> str:
    if not events:
        return '<p class="soft">No events recorded.</p>'
    rows = [(f'step {line["step"]:,}', line.get('text', '')) for line in events]
    table = _table(rows)
    if len(rows) <= 12:
        return f'<div class="card events">{table}</div>'
    return f'<details class="events"><summary>{len(rows)} events</summary>{table}</details>'


def _configuration(experiment: Any) -> str:
    """One fold for each section, under the names that the command line takes."""
    if not isinstance(experiment, dict) or not experiment:
        return '<p class="soft">run.json holds no configuration.</p>'
    alone = {k: v for k, v in experiment.items() if not isinstance(v, dict)}
    sections = {'experiment': alone} if alone else {}
    sections |= {k: {k: v} for k, v in experiment.items() if isinstance(v, dict)}
    blocks = []
    for name, section in sections.items():
        rows = _flat(section)
        blocks.append(
            f'<details><summary>{escape(name)} <span>{len(rows)} settings</span></summary>'
            f'{_table(rows)}</details>'
        )
    return ''.join(blocks)


def _flat(value: Any, name: str = '') -> list[tuple[str, str]]:
    """Dotted names and values, as in `--data.sources.0.name`."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and any(isinstance(x, dict | list) for x in value):
        pairs = list(enumerate(value))
    if not pairs:
        return [(name, json.dumps(value, ensure_ascii=False))]
    prefix = f'{name}.' if name else ''
    return [row for key, inner in pairs for row in _flat(inner, f'{prefix}{key}')]


def _provenance(facts: Line) -> str:
    versions = facts.get('versions')
    rows = [
        ('started', facts.get('started')),
        ('device', facts.get('device')),
        ('devices, processes', f'{facts.get("devices")}, {facts.get("processes")}'),
        ('git commit', facts.get('git_commit')),
        ('digest of the configuration', facts.get('digest')),
        *(versions.items() if isinstance(versions, dict) else ()),
    ]
    command = facts.get('command')
    if isinstance(command, list):
        rows.append(('command', shlex.join(map(str, command))))
    told = [(name, 'not recorded' if value is None else value) for name, value in rows]
    return f'<div class="card">{_table(told)}</div>'


def _table(rows: list[tuple[Any, Any]]) -> str:
    return (
        '<table>'
        + ''.join(f'<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows)
        + '</table>'
    )

"""A data set of BEIR or MTEB as records: `python -m benchmarks.beir scifact runs/data/scifact`.

Reads corpus.jsonl, queries.jsonl and the judgements of every split, qrels/SPLIT.tsv or .jsonl, and
writes SPLIT.jsonl: a line for each query with its relevant passages, and those that were judged to
be none as hard negatives. `experiments.finetune retrieval` reads them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import cli
from llama_jax.errors import UserError

Row = dict[str, Any]
_FIELDS = ('query-id', 'corpus-id', 'score')


@dataclass(frozen=True)
class Options:
    source: Annotated[Path, tyro.conf.Positional]
    """The directory with corpus.jsonl, queries.jsonl and qrels/."""
    directory: Annotated[Path, tyro.conf.Positional]
    """Where the records are written."""


def write(options: Options) -> None:
    """Raises UserError for files that are missing, and for ids that are in no file."""
    judged = sorted([*options.source.glob('qrels/*.tsv'), *options.source.glob('qrels/*.jsonl')])
    if not judged:
        raise UserError(f'{options.source} has no qrels/*.tsv or qrels/*.jsonl: give a BEIR set')
    splits = {path: list(_judgements(path)) for path in judged}
    of_query, of_passage = (
        {row[name] for rows in splits.values() for row in rows} for name in _FIELDS[:2]
    )
    queries = _texts(options.source / 'queries.jsonl', of_query)
    passages = _texts(options.source / 'corpus.jsonl', of_passage)
    options.directory.mkdir(parents=True, exist_ok=True)
    for path, rows in splits.items():
        found: dict[str, Row] = {}
        for row in rows:
            query, passage, score = (row[name] for name in _FIELDS)
            record = found.setdefault(
                query, {'query': queries[query]['text'], 'positive': [], 'negative': []}
            )
            kind = 'positive' if float(score) > 0 else 'negative'
            record[kind].append(passages[passage])
        records = [record for record in found.values() if record['positive']]
        written = options.directory / f'{path.stem}.jsonl'
        lines = (json.dumps(record, ensure_ascii=False) + '\n' for record in records)
        written.write_text(''.join(lines), 'utf-8')
        print(f'{written}: {len(records):,} queries')


def _judgements(path: Path) -> Iterator[Row]:
    with path.open(encoding='utf-8-sig', newline='') as file:
        rows = csv.DictReader(file, delimiter='\t') if path.suffix == '.tsv' else _objects(file)
        for row in rows:
            if missing := [name for name in _FIELDS if row.get(name) is None]:
                raise UserError(f'{path} has no {missing[0]}: give {", ".join(_FIELDS)}')
            yield {name: str(row[name]) for name in _FIELDS}


def _texts(path: Path, wanted: set[str]) -> dict[str, Row]:
    """The title and text of each id that is wanted."""
    if not path.is_file():
        raise UserError(f'there is no {path}: give a BEIR set')
    with path.open(encoding='utf-8-sig') as file:
        found = {
            str(row['_id']): {name: row[name] for name in ('title', 'text') if row.get(name)}
            for row in _objects(file)
            if str(row.get('_id')) in wanted
        }
    if missing := sorted(wanted - {name for name, row in found.items() if 'text' in row}):
        raise UserError(
            f'{path} has no text of {missing[0]!r}, which was judged: give the whole set'
        )
    return found


def _objects(lines: Any) -> Iterator[Row]:
    return (json.loads(line) for line in lines if line.strip())


def main() -> None:
    write(cli.options(Options, 'benchmarks.beir', __doc__))


if __name__ == '__main__':
    cli.main(main)

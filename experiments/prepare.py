"""Prepare the data of a configuration, apart from training:
`python -m experiments.prepare quickstart --data.files 'books/*.txt'`.

Stopped at any time, it goes on where it stopped. Training with the same data settings finds what
was prepared.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from experiments import cli
from llama_jax.data import sources
from llama_jax.errors import UserError


def main() -> None:
    experiment, options = cli.read('prepare', __doc__, processes=(int | None, None))
    if options.processes is not None and options.processes < 1:
        raise UserError(f'--processes is {options.processes}: give 1 or more, or leave it out')
    sources.check(experiment.data)
    for number, source in enumerate(experiment.data.sources):
        files = f' ({", ".join(source.files)})' if source.files else ''
        print(f'source {number}: {source.name}{files}, weight {source.weight:g}')
        begin = time.time()
        builder = sources.builder(source, options.processes)
        seconds = time.time() - begin
        splits = builder.info.splits
        for split in splits:
            found = splits[split]
            count, megabytes = found.num_examples, found.num_bytes / 1e6
            print(f'  {split:<11}{count:>13,} documents{megabytes:>12,.1f} MB')
        total = sum(splits[split].num_bytes for split in splits)
        how = f'in {seconds:.1f} s, {total / 1e6 / seconds:,.1f} MB/s'
        print(f'  {how if _written_since(begin, builder) else "was there"}: {builder.data_path}')


def _written_since(seconds: float, builder: Any) -> bool:
    path = Path(str(builder.data_path)) / 'dataset_info.json'
    return path.exists() and path.stat().st_mtime >= seconds - 0.01  # their clock ticks


if __name__ == '__main__':
    cli.main(main)

"""Make the report of a run or a comparison again: `python -m experiments.report runs/NAME`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import cli
from llama_jax.report import comparison, page


@dataclass(frozen=True)
class Options:
    workdir: tyro.conf.Positional[Path]
    """Of a training or a comparison."""


def main() -> None:
    workdir = cli.options(Options, 'report', __doc__).workdir
    compared = (workdir / 'grid.json').exists()
    print(comparison.write(workdir) if compared else page.write_report(workdir))


if __name__ == '__main__':
    cli.main(main)

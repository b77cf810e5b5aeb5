"""Make the report of a run or a comparison again: `python -m experiments.report runs/NAME`."""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments import cli
from llama_jax.report import comparison, page


def main() -> None:
    workdir = tyro.cli(
        tyro.conf.Positional[Path], prog='python -m experiments.report', description=__doc__
    )
    compared = (workdir / 'grid.json').exists()
    print(comparison.write(workdir) if compared else page.write_report(workdir))


if __name__ == '__main__':
    cli.main(main)

"""Make report.html again from the records of a run: `python -m experiments.report runs/NAME`."""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments import cli
from llama_jax.report.page import write_report


def main() -> None:
    run_dir = tyro.cli(
        tyro.conf.Positional[Path], prog='python -m experiments.report', description=__doc__
    )
    print(write_report(run_dir))


if __name__ == '__main__':
    cli.main(main)

"""Compare objectives: `python -m experiments.compare objectives_small --workdir runs/compare`.

Every arm is trained under every seed and evaluated, each run in a process of its own. Started again
with the same command it goes on; finished runs are left alone. In the end the working directory
holds results.json, results.csv and report.html. See docs/objectives.md.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax

from experiments import cli
from llama_jax import installed, runtime
from llama_jax.compare import fair, one, record, results, runner
from llama_jax.compare.budget import match_flops, table
from llama_jax.compare.grid import FACTORS, Planned, check_steps, only, runs, sweep
from llama_jax.errors import UserError
from llama_jax.report import comparison
from llama_jax.train.progress import say

_ONE = '--run'
"""The option with which this script starts itself: --run WORKDIR ARM/seed-K."""
_SELF = ('-m', 'llama_jax', 'compare')


def main() -> None:
    if sys.argv[1:2] == [_ONE]:
        runtime.initialize()
        one.run(Path(sys.argv[2]), sys.argv[3])
        return
    grid, options = cli.read_grid(
        'compare',
        __doc__,
        workdir=(Path | None, None),
        seeds=(int | None, None),
        jobs=(int, 1),
        only=(tuple[str, ...], ()),
        match=(Literal['tokens', 'flops'], 'tokens'),
        lr_sweep=(tuple[float, ...] | None, None),
    )
    jax.config.update('jax_platforms', 'cpu')  # accelerators are for the runs
    workdir = options.workdir or Path('runs') / grid.name
    if options.jobs < 1:
        raise UserError(f'--jobs {options.jobs}: it must be 1 or more')
    if options.seeds is not None:
        grid = replace(grid, seeds=options.seeds)
    check_steps(grid)
    grid = fair.resolved(grid)
    if options.match == 'flops':
        grid = match_flops(grid)
    planned = runs(grid)
    if options.lr_sweep is not None:
        planned += sweep(grid, options.lr_sweep or FACTORS)
    planned = only(grid, planned, options.only)

    record.check_workdir(workdir, grid)
    proof = fair.check(grid, say)
    say(f'{grid.title}\n{table(proof.budget)}')
    command = f'{installed.command("compare")} {shlex.join(sys.argv[1:])}'
    record.write(workdir, grid, proof, command, config_file=options.config_file)
    failed = runner.run_all(planned, workdir, command=_command(workdir), jobs=options.jobs)
    record.note_device(workdir)
    results.write(workdir, results.collect(workdir))
    say(f'report: {comparison.write(workdir)}')
    for line in failed:
        print(f'error: {line}', file=sys.stderr)
    if failed:
        raise SystemExit(1)


def _command(workdir: Path) -> Callable[[Planned], list[str]]:
    def command(run: Planned) -> list[str]:
        return [sys.executable, *_SELF, _ONE, str(workdir), run.place]

    return command


if __name__ == '__main__':
    cli.main(main)

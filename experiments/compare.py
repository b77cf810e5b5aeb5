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
from typing import Any, Literal

import jax

from experiments import cli
from llama_jax import installed, runtime
from llama_jax.compare import baselines, fair, one, power, record, results, runner, tune
from llama_jax.compare.budget import match_flops, match_text, table
from llama_jax.compare.grid import FACTORS, Grid, Planned, check_steps, only, runs, sweep
from llama_jax.errors import UserError
from llama_jax.report import comparison
from llama_jax.report.grid import read_grid
from llama_jax.report.judged import Judged
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
        match=(Literal['tokens', 'flops', 'text'] | None, None),
        tune_rates=(tuple[float, ...] | None, None),
        lr_sweep=(tuple[float, ...] | None, None),
        power=(tuple[str, ...], ()),
        sd=(float | None, None),
        aa=(bool, True),
    )
    jax.config.update('jax_platforms', 'cpu')  # accelerators are for the runs
    workdir = options.workdir or Path('runs') / grid.name
    if options.jobs < 1:
        raise UserError(f'--jobs {options.jobs}: it must be 1 or more')
    if options.seeds is not None:
        grid = replace(grid, seeds=options.seeds)
    grid = replace(grid, again=grid.again and options.aa)
    if options.power or options.sd is not None:
        for line in power.told(grid, workdir, options.power, options.sd):
            print(line)
        return
    if options.match == 'tokens' and grid.match != 'tokens':
        raise UserError(
            f'--match tokens has no effect: {grid.name} is matched by {grid.match} where it is '
            'defined; leave it out'
        )
    check_steps(grid)
    only(grid, [], options.only)
    record.check_place(workdir)
    grid = fair.resolved(grid)
    if options.match == 'flops':
        grid = match_flops(grid)
    elif options.match == 'text':
        grid = match_text(grid, fair.text_of)
    grid, tuning = _tuned(grid, workdir, options)
    planned = runs(grid)
    if options.lr_sweep is not None:
        planned += sweep(grid, options.lr_sweep or FACTORS)
    if grid.baselines:
        planned += baselines.runs(grid)
    planned = only(grid, planned, options.only)

    _begin(grid, workdir, options, tuning)
    failed = _run(planned, workdir, options)
    record.note_device(workdir)
    judged = Judged(read_grid(workdir))
    results.write(workdir, results.collect(judged))
    say(f'report: {comparison.write(workdir, judged)}')
    _stop_at(failed)


def _begin(grid: Grid, workdir: Path, options: Any, tuning: dict[str, Any] | None) -> None:
    """Prove that the grid is fair, and record it."""
    record.check_workdir(workdir, grid, options.config_file)
    proof = fair.check(grid, say)
    record.check_proof(workdir, proof)
    say(f'{grid.title}\n{table(proof.budget)}')
    command = f'{installed.command("compare")} {shlex.join(sys.argv[1:])}'
    record.write(workdir, grid, proof, command, config_file=options.config_file, tuning=tuning)


def _tuned(grid: Grid, workdir: Path, options: Any) -> tuple[Grid, dict[str, Any] | None]:
    """The grid with each arm at the rate that its own held-out loss chooses, and how; as it is
    without --tune-rates."""
    known = record.rates(workdir)
    if options.tune_rates is None:
        if known is not None:
            raise UserError(f'{workdir} was begun with --tune-rates: give it again')
        return grid, None
    if known is None and record.read(workdir) is not None:
        raise UserError(f'{workdir} was begun without --tune-rates: use another --workdir')
    if options.lr_sweep is not None:
        raise UserError('--lr-sweep and --tune-rates both try rates: give one of the two')
    factors = options.tune_rates or tune.FACTORS
    tune.check(grid, factors)
    found = dict((record.read(workdir) or {}).get(record.TUNING) or {})
    tried = only(grid, tune.runs(grid, factors), options.only)
    missing = [run for run in tried if run.arm not in found]
    tune.check_found(tried, found, workdir)
    if missing:
        untuned = tune.at_rates(grid, known or {})
        _begin(untuned, workdir, options, found)
        say('trying learning rates, each arm under the first seed')
        _stop_at(_run(missing, workdir, options))
        for arm, tuned in tune.chosen(missing, workdir).items():
            found[arm] = tuned.facts()
            edge = ', at the edge of those tried' if tuned.at_the_edge else ''
            say(f'{arm}: learning rate {tuned.rate:g}{edge}')
        # The rates that are chosen stand in the record before a run begins at them.
        record.retune(workdir, grid, found)
        grid = tune.at_rates(grid, record.rates(workdir) or {})
        tune.take_over(grid, workdir)
        return grid, found
    return tune.at_rates(grid, known or {}), found


def _run(planned: list[Planned], workdir: Path, options: Any) -> list[str]:
    """A line for each run that failed."""
    return runner.run_all(planned, workdir, command=_command(workdir), jobs=options.jobs)


def _stop_at(failed: list[str]) -> None:
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

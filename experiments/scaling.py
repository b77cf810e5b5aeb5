"""A scaling law of the runs of comparisons: `python -m experiments.scaling runs/scaling_*`.

Fits L = E + A / N^alpha + B / D^beta to the finished runs of all directories, for each objective by
itself, with intervals; forecasts the largest run from the others, and says which objective is best
at which budget. Writes scaling.json and pictures into --output. See docs/scaling.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import cli
from llama_jax.compare import scaling_report
from llama_jax.errors import UserError
from llama_jax.report import draw
from llama_jax.train.records import write_atomically


@dataclass(frozen=True)
class Options:
    workdirs: tyro.conf.Positional[tuple[Path, ...]]
    """Of comparisons (experiments.compare), each with its sizes and tokens."""
    metric: str = 'bits_per_byte'
    """Of evaluation.json, lower is better; or `loss`, each arm's own at the end."""
    output: Path = Path('.')
    """Directory for scaling.json and the pictures."""
    resamples: int = 200
    """Of the bootstrap over runs."""


def main() -> None:
    options = cli.options(Options, 'scaling', __doc__)
    if not options.output.is_dir():
        raise UserError(f'--output {options.output}: there is no such directory: make it first')
    if options.resamples < 2:
        raise UserError(f'--resamples {options.resamples}: give 2 or more')
    found = scaling_report.read(options.workdirs, options.metric, print)
    result, pictures = scaling_report.report(found, options.metric, resamples=options.resamples)
    write_atomically(options.output / 'scaling.json', json.dumps(result, indent=1))
    print('\n'.join(lines(result)))
    for path in draw.write_pngs(options.output, pictures):
        print(path)


def lines(result: dict) -> Iterator[str]:
    """What was found, a line each."""
    for name, one in result['objectives'].items():
        yield f'{name}: {one["runs"]} runs, {result["metric"]}'
        if 'why' in one:
            yield f'  no law: {one["why"]}'
            continue
        for number, (value, low, high) in one['law'].items():
            yield f'  {number:<8}{_number(value):>16}  [{_number(low)}, {_number(high)}]'
        for check in one['largest']:
            forecast, low, high = (_number(check[key]) for key in ('forecast', 'low', 'high'))
            yield (
                f'  the largest run, by a law of the others: {forecast} [{low}, {high}], '
                f'measured {check["measured"]:.4f}'
            )
        for budget, (parameters, loss) in one['iso_flops'].items():
            size = f'{parameters:,.0f} parameters'
            yield f'  at {float(budget):.2e} FLOPs best with {size}: {loss:.4f}'
    for budget, name in result['best'].items():
        yield f'best at {float(budget):.2e} FLOPs: {name}'


def _number(value: float | None) -> str:
    return 'beyond any float' if value is None else f'{value:.5g}'


if __name__ == '__main__':
    cli.main(main)

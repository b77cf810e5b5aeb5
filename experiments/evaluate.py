"""Measure a trained model: `python -m experiments.evaluate runs/NAME`.

Prints every metric with its 95% interval and writes evaluation.json into the directory, or to
--output. What each of them is, and which do not apply to which objective: docs/evaluation.md.
runs/NAME@400 is the checkpoint of step 400, of which evaluation-400.json will tell, and
runs/NAME@best the best.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from experiments import cli
from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.suite import Suite, evaluate_trained
from llama_jax.mesh import MeshConfig
from llama_jax.train.records import write_atomically
from llama_jax.train.restore import load, named


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]
    """The --workdir of a training, RUN, or RUN@STEP or RUN@best."""
    output: Path | None = None
    """File for the result; default: evaluation.json in the directory, or evaluation-STEP.json."""
    suite: Suite = field(default_factory=Suite)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def main() -> None:
    options = cli.options(Options, 'evaluate', __doc__)
    workdir, step = named(options.run, 'RUN')
    path = options.output or workdir / 'evaluation.json'
    if options.output is None and any((up / 'grid.json').exists() for up in path.parents[1:4]):
        raise UserError(
            f'{workdir} is a run of a comparison, which takes it for finished once it '
            'has an evaluation.json: give --output FILE'
        )
    if not path.parent.is_dir():
        raise UserError(f'--output {path}: there is no directory {path.parent}: make it first')
    mesh = meshes.make(options.mesh)
    trained = load(options.run, mesh, what='RUN')
    if options.output is None and step is not None:
        path = workdir / f'evaluation-{trained.step}.json'
    result = evaluate_trained(trained, trained.experiment, options.suite, mesh)
    write_atomically(path, json.dumps(result, indent=1))
    print('\n'.join(table(result)))
    print(f'step {result["step"]}, {result["seconds"]:.0f} s: {path}')


def table(result: dict[str, Any]) -> Iterator[str]:
    """A line for each metric: name, value, interval, examples."""
    for name, metric in METRICS.items():
        found = result['metrics'][name]
        shown = 'n/a'
        if found['value'] is not None:
            shown = '{value:7.3f}  [{low:.3f}, {high:.3f}]  n = {n}'.format(**found)
        yield f'{metric.label:<32}{metric.unit:<15}{shown}'


if __name__ == '__main__':
    cli.main(main)

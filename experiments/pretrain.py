"""Pre-train a model: `python -m experiments.pretrain quickstart --workdir runs/quickstart`.

Started again with the same command it goes on from the newest checkpoint. In the end the run's
directory holds report.html; `python -m experiments.report DIRECTORY` writes it at any time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import jax
from tyro.conf import arg

from experiments import cli
from llama_jax import runtime
from llama_jax.report.compressors import write_baselines
from llama_jax.report.page import write_report
from llama_jax.train import profile
from llama_jax.train.loop import train
from llama_jax.train.progress import say
from llama_jax.train.signals import caught

_PROFILE = Annotated[str | None, arg(help='Steps to trace for XProf, such as 10:15.')]


def main() -> None:
    experiment, options = cli.read(
        'pretrain', __doc__, workdir=(Path | None, None), profile=(_PROFILE, None)
    )
    workdir = options.workdir or Path('runs') / experiment.name
    traced = profile.steps(options.profile) if options.profile is not None else None
    runtime.initialize()
    train(experiment, workdir, profile=traced)
    if jax.process_index() != 0:
        return
    left = f'after the last step: python -m experiments.report {workdir} writes the report'
    with caught() as signals, signals.stopping(left):
        if experiment.evaluation.every:
            write_baselines(experiment.data, workdir / 'baselines.json')
        say(f'report: {write_report(workdir)}')


if __name__ == '__main__':
    cli.main(main)

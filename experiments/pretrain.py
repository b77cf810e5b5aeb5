"""Pre-train a model: `python -m experiments.pretrain quickstart --workdir runs/quickstart`.

Started again with the same command it goes on from the newest checkpoint. In the end the run's
directory holds report.html; `python -m experiments.report DIRECTORY` writes it at any time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import jax
from tyro.conf import UseCounterAction, arg

from experiments import cli
from llama_jax import installed, runtime
from llama_jax.data.record import Text
from llama_jax.errors import UserError
from llama_jax.report.compressors import write_baselines
from llama_jax.report.page import write_report
from llama_jax.train import profile
from llama_jax.train.branch import branch
from llama_jax.train.check_data import check_data
from llama_jax.train.experiment import Experiment
from llama_jax.train.explain import explain
from llama_jax.train.loop import train
from llama_jax.train.progress import say
from llama_jax.train.show import show_batches, show_examples
from llama_jax.train.signals import caught

_PROFILE = Annotated[str | None, arg(help='Steps to trace for XProf, such as 10:15.')]
_WANDB = Annotated[str | None, arg(help='A project of wandb that gets the scalars as well.')]
_SHOW = Annotated[int | None, arg(help='Print so many batches as text, and train nothing.')]
_EXAMPLES = Annotated[
    int | None, arg(help='Print so many examples by themselves, and train nothing.')
]
_BRANCH = Annotated[
    str | None,
    arg(help='RUN@STEP: go on from a checkpoint of another run, with its optimizer and its data.'),
]
_CHECK = Annotated[UseCounterAction[int], arg(help='Read all data, and train nothing.')]
_EXPLAIN = Annotated[UseCounterAction[int], arg(help='Say what will happen, and train nothing.')]


OPTIONS: dict[str, tuple[Any, Any]] = {
    'workdir': (Path | None, None),
    'branch': (_BRANCH, None),
    'profile': (_PROFILE, None),
    'wandb': (_WANDB, None),
    'show_batch': (_SHOW, None),
    'show_examples': (_EXAMPLES, None),
    'check': (_CHECK, 0),
    'explain': (_EXPLAIN, 0),
}
"""What a script that trains takes beside the settings of its experiment."""


def main() -> None:
    run(*cli.read('pretrain', __doc__, **OPTIONS))


def run(experiment: Experiment, options: Any) -> None:
    """Train, or say what would happen, as the OPTIONS ask."""
    workdir = options.workdir or Path('runs') / experiment.name
    traced = profile.steps(options.profile) if options.profile is not None else None
    training = ('workdir', 'branch', 'profile', 'wandb', 'explain')
    if options.check:
        _refuse(options, 'check', (*training, 'show_batch', 'show_examples'))
        check_data(experiment)
        return
    for name, show in (('show_batch', show_batches), ('show_examples', show_examples)):
        if getattr(options, name) is not None:
            _refuse(options, name, (*training, *{'show_batch', 'show_examples'} - {name}))
            show(experiment, getattr(options, name))
            return
    if options.explain:
        _refuse(options, 'explain', ('branch', 'profile', 'wandb'))
    runtime.initialize()
    if options.branch is not None:
        branch(options.branch, workdir)
    if options.explain:
        with caught() as signals, signals.stopping('before anything was said'):
            text = explain(experiment, workdir)
        if jax.process_index() == 0:
            print(text)
        return
    train(experiment, workdir, profile=traced, wandb=options.wandb, config_file=options.config_file)
    if jax.process_index() != 0:
        return
    left = f'after the last step: {installed.command("report")} {workdir} writes the report'
    with caught() as signals, signals.stopping(left):
        if experiment.evaluation.every and experiment.objective.reads is Text:
            write_baselines(experiment.data, workdir / 'baselines.json')
        say(f'report: {write_report(workdir)}')


def _refuse(options: Any, name: str, without: Iterable[str]) -> None:
    """Raise UserError for options that have no effect beside another."""
    for other in without:
        if getattr(options, other) not in (None, 0):
            raise UserError(
                f'--{other.replace("_", "-")} has no effect with --{name.replace("_", "-")}, which '
                'trains nothing: leave out one of them'
            )


if __name__ == '__main__':
    cli.main(main)

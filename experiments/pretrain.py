"""Pre-train a model: `python -m experiments.pretrain quickstart --workdir runs/quickstart`."""

from __future__ import annotations

from pathlib import Path

from experiments import cli
from llama_jax import runtime


def main() -> None:
    runtime.initialize()
    experiment, options = cli.read('pretrain', __doc__, workdir=(Path | None, None))
    workdir = options.workdir or Path('runs') / experiment.name

    from llama_jax.train.loop import train

    train(experiment, workdir)


if __name__ == '__main__':
    cli.main(main)

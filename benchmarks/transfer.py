"""The best learning rate by width, with muP and without: `python -m benchmarks.transfer`.

Trains `--configuration` at every width, at every rate, each twice: as it is, and with
`model.base_dim` at the smallest width. Prints the last training losses, and the best rate of each
width: with muP it should stay within a factor of 2, without it moves. The defaults take about an
hour on two cores; what was trained is in DIRECTORY/runs.json, and the same command goes on there.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import configs
from experiments import cli
from llama_jax.errors import DivergedError, UserError
from llama_jax.optim import REGISTRY
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.train import loop
from llama_jax.train.experiment import Experiment
from llama_jax.train.records import read_metrics, write_atomically

HEAD = 32
LAST = 0.1
"""Share of the steps over whose losses the mean is taken."""


@dataclass(frozen=True)
class Options:
    configuration: str = 'quickstart'
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """The first is the base. Heads of 32, a feed-forward layer of three times the width."""
    layers: int = 2
    optimizer: str = 'adamw'
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    steps: int = 200
    batch: int = 8
    seq_len: int = 128
    directory: Path = Path('runs/transfer')
    picture: Path | None = None
    """A PNG or SVG of loss by rate; a star is the best of a width."""


def main(options: Options) -> None:
    if any(width % HEAD for width in options.widths):
        raise UserError(f'--widths: each must be a multiple of {HEAD}')
    if options.optimizer not in REGISTRY:
        raise UserError(f'--optimizer {options.optimizer}: there are {", ".join(REGISTRY)}')
    options.directory.mkdir(parents=True, exist_ok=True)
    path = options.directory / 'runs.json'
    done = json.loads(path.read_text()) if path.exists() else {}
    for mup in (True, False):
        for width in options.widths:
            for rate in options.rates:
                name = name_of(options, width, rate, mup=mup)
                if name not in done:
                    done[name] = loss(experiment(options, width, rate, mup=mup))
                    write_atomically(path, json.dumps(done, indent=1))
                print(f'{name}: {done[name]:.4f}', flush=True)
    curves = {
        (mup, width): [done[name_of(options, width, rate, mup=mup)] for rate in options.rates]
        for mup in (True, False)
        for width in options.widths
    }
    for (mup, width), losses in curves.items():
        best = options.rates[losses.index(min(losses))]
        print(f'{"muP" if mup else "usual"}, width {width}: best at {best:g} ({min(losses):.4f})')
    if options.picture is not None:
        draw(curves, options.rates, options.picture)


def name_of(options: Options, width: int, rate: float, *, mup: bool) -> str:
    kind = f'muP from {options.widths[0]}' if mup else 'usual'
    model = f'{options.configuration}, {options.layers} layers, width {width}'
    length = f'{options.steps} x {options.batch} x {options.seq_len}'
    return f'{model}, {kind}, {options.optimizer} {rate:g}, {length}'


def experiment(options: Options, width: int, rate: float, *, mup: bool) -> Experiment:
    """The configuration at a width and a peak learning rate."""
    base = configs.get(options.configuration)
    heads, smallest = width // HEAD, options.widths[0]
    model = replace(
        base.model,
        **{'dim': width, 'ffn': 3 * width, 'heads': heads, 'kv_heads': heads, 'head_dim': HEAD},
        layers=options.layers,
        base_dim=smallest if mup else 0,
    )
    train = replace(
        base.train,
        **{'steps': options.steps, 'batch': options.batch, 'seq_len': options.seq_len},
        log_every=1,
    )
    schedule = ScheduleConfig(peak=rate, warmup_steps=options.steps // 10)
    return replace(
        base,
        model=model,
        train=train,
        optimizer=REGISTRY[options.optimizer](schedule=schedule),
        evaluation=replace(base.evaluation, every=0),
        checkpoint=replace(base.checkpoint, every=0),
    )


def loss(experiment: Experiment) -> float:
    """Mean of the last training losses; infinite where training broke off."""
    with tempfile.TemporaryDirectory() as workdir:
        try:
            loop.train(experiment, Path(workdir))
        except DivergedError:
            return float('inf')
        lines = [line for line in read_metrics(Path(workdir)) if line['kind'] == 'train']
    last = lines[-max(1, round(LAST * len(lines))) :]
    losses = [line['loss'] for line in last]
    return float('inf') if None in losses else statistics.fmean(losses)  # one was not finite


def draw(curves: dict[tuple[bool, int], list[float]], rates: tuple[float, ...], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, sharey=True, figsize=(9, 4))
    for axes, mup in zip(both, (False, True), strict=True):
        for (kind, width), losses in curves.items():
            if kind is mup:
                (line,) = axes.plot(rates, losses, marker='o', label=f'width {width}')
                least = losses.index(min(losses))
                axes.plot(rates[least], losses[least], '*', color=line.get_color(), markersize=14)
        axes.set(xscale='log', xlabel='peak learning rate', title='muP' if mup else 'without')
        axes.set_xticks(rates, [f'{rate:g}' for rate in rates])
        axes.minorticks_off()
    both[1].legend()
    both[0].set_ylabel('training loss')
    figure.savefig(path, bbox_inches='tight')


if __name__ == '__main__':
    cli.main(lambda: main(cli.options(Options, 'benchmarks.transfer', __doc__)))

"""Cost of a step under every optimizer: `python -m benchmarks.optimizers`.

One backbone and batch; steps of all optimizers take turns in one run, and medians are compared.
Processor seconds tell more than the clock where others use the machine. 'state' is what an
optimizer keeps, in bytes per parameter.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import jax

import configs
from benchmarks.objectives import steps
from experiments import cli
from llama_jax import trees
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.optim import REGISTRY
from llama_jax.optim.base import optimizer
from llama_jax.train.experiment import resolved


@dataclass(frozen=True)
class Options:
    configuration: str = 'quickstart'
    """Backbone, data and batch."""
    rounds: int = 7
    steps: int = 2
    """Steps of each optimizer in a round."""
    only: tuple[str, ...] = tuple(REGISTRY)
    json: Path | None = None


def main(options: Options) -> None:
    unknown = sorted({*options.only} - {*REGISTRY})
    if unknown or not options.only or min(options.rounds, options.steps) < 1:
        raise UserError(
            f'--only {" ".join(unknown or options.only)} --rounds {options.rounds} --steps '
            f'{options.steps}: give one or more of {", ".join(REGISTRY)}, and 1 or more of both'
        )
    base = configs.get(options.configuration)
    tokenizer = load_tokenizer(base.data)
    base = resolved(base, tokenizer.vocab_size)
    schedule = base.optimizer.schedule
    arms = {
        name: dataclasses.replace(base, optimizer=REGISTRY[name](schedule=schedule))
        for name in options.only
    }
    takes = {name: steps(experiment, tokenizer) for name, experiment in arms.items()}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    processor: dict[str, list[float]] = {name: [] for name in arms}
    for take in takes.values():
        take(1)
    for _ in range(options.rounds):
        for name, take in takes.items():
            begin, spent = time.perf_counter(), time.process_time()
            take(options.steps)
            wall[name].append((time.perf_counter() - begin) / options.steps)
            processor[name].append((time.process_time() - spent) / options.steps)
    params = layers.abstract(base.model)
    result = {}
    print(f'{"":12} s a step   processor s   of {options.only[0]}   state, bytes per parameter')
    for name, experiment in arms.items():
        state = jax.eval_shape(optimizer(experiment.optimizer).init, params)
        kept = trees.n_bytes(state) / trees.size(params)
        seconds, spent = statistics.median(wall[name]), statistics.median(processor[name])
        first = statistics.median(processor[options.only[0]])
        print(f'{name:12} {seconds:8.3f}   {spent:11.3f}   {spent / first:8.2f}   {kept:8.2f}')
        result[name] = {'seconds': seconds, 'processor_seconds': spent, 'bytes': kept}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
    cli.main(lambda: main(cli.options(Options, 'benchmarks.optimizers', __doc__)))

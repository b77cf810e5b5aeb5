"""Training speed of every objective beside causal LM: `python -m benchmarks.objectives`.

One backbone, batch and optimizer; steps of all objectives take turns in one run, and medians are
compared. 'of its FLOPs' is speed over what the ratio of model FLOPs promises: 1 where an objective
costs what its FLOPs cost. The host's share is what one thread makes of documents, tokenising and
packing included, over what the step eats.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

import configs
from experiments import cli
from llama_jax import mesh as meshes
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.loader import Loader
from llama_jax.data.record import QueryPassages
from llama_jax.data.sources import documents
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import ModelConfig
from llama_jax.objectives import of_text
from llama_jax.objectives.base import EXTRA, Objective
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.dense_retrieval import DenseRetrieval
from llama_jax.objectives.distill import TEACHER, Distillation, Teacher
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.moco import MomentumContrast
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.weighted import Weighted
from llama_jax.optim.base import optimizer
from llama_jax.optim.schedule import schedule
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment, resolved
from llama_jax.train.run import place
from llama_jax.train.step import initial_state, train_step


class _Everywhere:
    """With the last layer at places that nobody reads."""

    def _room(self, model: ModelConfig, seq_len: int) -> None:
        return None


@dataclass(frozen=True)
class _MaskedEverywhere(_Everywhere, MaskedLM):
    pass


@dataclass(frozen=True)
class _SpansEverywhere(_Everywhere, SpanCorruption):
    pass


ITSELF = 'a model of its own size'
ARMS: dict[str, Objective] = {
    **of_text(),
    'distill': Distillation(teacher=ITSELF),
    'retrieval': DenseRetrieval(),
    'masked, last layer everywhere': _MaskedEverywhere(),
    'spans, last layer everywhere': _SpansEverywhere(),
    'moco': MomentumContrast(queue=4096),
    'spans, encoder-decoder': SpanCorruption(encoder=True),
    'causal + contrastive': Weighted(
        parts=(CausalLM(), InfoNCE(bidirectional=False)), weights=(1.0, 0.1), shares=(0.5, 0.5)
    ),
    'causal + contrastive, one pass': Weighted(
        parts=(CausalLM(), InfoNCE(views='shared')), weights=(1.0, 0.1)
    ),
}


@dataclass(frozen=True)
class Options:
    configuration: str = 'quickstart'
    """Backbone, data, batch and optimizer; an encoder-decoder divides its layers in halves."""
    rounds: int = 7
    steps: int = 2
    """Steps of each objective in a round."""
    only: tuple[str, ...] = ()
    """These objectives beside causal; none: all."""
    json: Path | None = None


def main(options: Options) -> None:
    base = configs.get(options.configuration)
    tokenizer = load_tokenizer(base.data)
    base = resolved(base, tokenizer.vocab_size)
    names = ('causal', *options.only) if options.only else tuple(ARMS)
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise SystemExit(f'there is no {unknown[0]!r}: there are {", ".join(ARMS)}')
    with tempfile.TemporaryDirectory() as directory:
        _measure(options, base, tokenizer, names, Path(directory))


def _measure(
    options: Options,
    base: Experiment,
    tokenizer: Tokenizer,
    names: Sequence[str],
    directory: Path,
) -> None:
    arms = {name: arm(base, ARMS[name], name, directory) for name in names}
    takes = {name: steps(experiment, tokenizer) for name, experiment in arms.items()}
    host = {name: host_speed(experiment, tokenizer) for name, experiment in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for take in takes.values():
        take(2)
    for _ in range(options.rounds):
        for name, take in takes.items():
            begin = time.perf_counter()
            take(options.steps)
            seconds[name].append((time.perf_counter() - begin) / options.steps)

    positions = base.train.batch * base.train.seq_len
    result = {}
    for name, experiment in arms.items():
        flops = flops_of(experiment)
        speed = positions / statistics.median(seconds[name])
        result[name] = {'tokens_per_second': speed, 'flops': flops, 'host': host[name] / speed}
    causal = result['causal']
    print(f'{"":24} tokens/s   MFLOP/token   of causal: speed, promised   of its FLOPs   host')
    for name, r in result.items():
        ratio = r['tokens_per_second'] / causal['tokens_per_second']
        promised = causal['flops'] / r['flops']
        print(
            f'{name:24} {r["tokens_per_second"]:8,.0f}   {r["flops"] / 1e6:11.1f}   '
            f'{ratio:17.2f}, {promised:8.2f}   {ratio / promised:12.2f}   {r["host"]:4.0f} x'
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def arm(base: Experiment, objective: Objective, name: str, directory: Path) -> Experiment:
    """`base` under another objective; an encoder-decoder of as many layers where it needs one.
    `directory` is for records that are made of its text."""
    model = base.model
    try:
        objective.check(model)
    except UserError:
        half = model.layers // 2
        model = dataclasses.replace(model, layers=half, encoder_layers=half)
    data = queries(base.data, directory) if objective.reads is QueryPassages else base.data
    return dataclasses.replace(base, objective=objective, model=model, data=data)


def queries(data: DataConfig, directory: Path, n: int = 2048) -> DataConfig:
    """The beginnings of documents, each to find what follows, beside what follows another."""
    path = directory / 'queries.jsonl'
    texts = [text for text in itertools.islice(documents(data, 'train'), n) if len(text) > 200]
    with path.open('w', encoding='utf-8') as file:
        for text, other in zip(texts, [*texts[1:], texts[0]], strict=True):
            record = {'query': text[:50], 'positive': text[50:200], 'negative': other[50:200]}
            file.write(json.dumps(record) + '\n')
    source = Source('records', files=(str(path),))
    return dataclasses.replace(data, sources=(source,), validation=())


def flops_of(experiment: Experiment) -> float:
    """Per position, those of a teacher included."""
    objective, seq_len = experiment.objective, experiment.train.seq_len
    flops = objective.flops(experiment.model, seq_len)
    return flops * 4 / 3 if isinstance(objective, Distillation) else flops


def loader_of(experiment: Experiment, tokenizer: Tokenizer) -> Loader:
    train = experiment.train
    return Loader(
        experiment.data,
        split='train',
        tokenizer=tokenizer,
        maker=experiment.objective,
        batch=train.batch,
        seq_len=train.seq_len,
        seed=0,
    )


def host_speed(experiment: Experiment, tokenizer: Tokenizer, seconds: float = 2.0) -> float:
    """Positions per second that one thread prepares."""
    with loader_of(experiment, tokenizer) as loader:
        for _ in range(2 * experiment.data.prefetch):
            next(loader)
        n, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            next(loader)
            n += 1
        elapsed = time.perf_counter() - begin
    return n * experiment.train.batch * experiment.train.seq_len / elapsed


def steps(experiment: Experiment, tokenizer: Tokenizer) -> Callable[[int], float]:
    """Takes so many training steps on one batch of real text, and returns the last loss."""
    devices = meshes.make(MeshConfig())
    tx = optimizer(experiment.optimizer)
    state = initial_state(experiment.model, experiment.objective, tx, seed=0, mesh=devices)
    if isinstance(experiment.objective, Distillation):
        teacher = Teacher(jax.tree.map(jnp.copy, state.params), experiment.model)
        state = dataclasses.replace(state, frozen={EXTRA: {TEACHER: teacher}})
    step = train_step(
        experiment.model,
        experiment.objective,
        tx,
        learning_rate=schedule(experiment.optimizer.schedule, experiment.train.steps),
        accumulate=1,
        compute=experiment.compute,
    )
    with loader_of(experiment, tokenizer) as loader, jax.set_mesh(devices):
        batch = place(next(loader), devices)

    def take(n: int) -> float:
        nonlocal state
        with jax.set_mesh(devices):
            for _ in range(n):
                state, metrics = step(state, batch)
        return float(metrics['loss'])

    return take


if __name__ == '__main__':
    main(cli.options(Options, 'benchmarks.objectives', __doc__))

"""Compile an experiment's training step for a TPU that is not there, and say what it costs.

    python -m tpu.plan llama1_65b --topology v4:8x16x16 [--train.batch 2048] [--json plan.json]

The step is that of a training, with all overrides of its command; the TPU compiler runs on the CPU.
Of a grid (`python -m tpu.plan objectives_1b --topology v5e:4x8`, or `mine.py:grid`) every arm is
planned, or those of `--only causal masked`. It tells the memory of a chip and every exchange
between chips. Needs the extra `tpu` (Linux).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding

import configs
from configs import own
from experiments import cli
from llama_jax import layout
from llama_jax import mesh as meshes
from llama_jax.compare.grid import Grid, only, runs
from llama_jax.data import packing, pieces
from llama_jax.errors import UserError
from llama_jax.model.tune import Full
from llama_jax.model.width import width_of
from llama_jax.optim.base import optimizer
from llama_jax.optim.schedule import schedule
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.train.experiment import Experiment, check, resolved, steps_of
from llama_jax.train.flops import flops_per_token
from llama_jax.train.step import abstract_state, averaging, train_step
from tpu import hlo, topology
from tpu.hlo import Collective


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    arguments: int
    """State and batch."""
    optimizer: int
    """Of them the state of the optimizer."""
    new_outputs: int
    """Results that do not reuse the memory of an argument."""
    reused_outputs: int
    """The new state, in the memory of the old."""
    temporary: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.new_outputs + self.temporary + self.code


@dataclass(frozen=True)
class Plan:
    """What the compiler says of one training step."""

    experiment: Experiment
    slice: topology.Slice
    mesh: dict[str, int]
    memory: Memory
    collectives: list[Collective]
    kernels: dict[str, int]
    """Custom kernels (attention) and how often a step runs them."""
    cycles: int
    """Estimated by the compiler, of everything but kernels and collectives."""
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.slice.chip.hbm_bytes

    def weights_by_all_reduce(self) -> list[Collective]:
        """Weights that are brought together at the price of a reduction."""
        return [c for c in self.collectives if c.gathers]


def plan(experiment: Experiment, where: topology.Slice, say: Any = lambda line: None) -> Plan:
    """Compile the training step of `experiment` for `where`; `say` gets lines of progress.

    Raises UserError for settings that do not fit each other or the slice.
    """
    experiment = _sized(experiment)
    mesh = meshes.make(experiment.mesh, where.devices())
    check(experiment, mesh)
    transform = optimizer(experiment.optimizer, width_of(experiment.model))
    rate = experiment.optimizer.schedule
    step = train_step(
        experiment.model,
        experiment.objective,
        transform,
        # Of any number of steps, where only the text tells it: the program is the same.
        learning_rate=schedule(rate, steps_of(experiment.train) or rate.warmup_steps + 1),
        accumulate=experiment.train.accumulate,
        compute=experiment.compute,
        average=experiment.optimizer.average,
    )
    state = abstract_state(experiment.model, experiment.objective, transform)
    if experiment.optimizer.average:
        state = jax.eval_shape(averaging, state)
    state = jax.tree.map(_placed, state, layout.shardings(state, mesh))
    start = time.monotonic()
    with jax.set_mesh(mesh):
        say(f'lowering for {where.chips} chips, mesh {_nonempty(mesh)}')
        lowered = step.lower(state, abstract_batch(experiment, mesh))
        say('compiling (a minute or more for a large model)')
        compiled = lowered.compile()
    seconds = time.monotonic() - start
    say(f'compiled after {seconds:.0f} s')
    stats = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text())
    return Plan(
        experiment=experiment,
        slice=where,
        mesh=dict(mesh.shape),
        memory=Memory(
            arguments=stats.argument_size_in_bytes,
            optimizer=sum(map(_bytes_of_shard, jax.tree.leaves(state.optimizer))),
            new_outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
            reused_outputs=stats.alias_size_in_bytes,
            temporary=stats.temp_size_in_bytes,
            code=stats.generated_code_size_in_bytes,
        ),
        collectives=hlo.collectives(program),
        kernels=hlo.kernels(program),
        cycles=hlo.estimated_cycles(program),
        compile_seconds=seconds,
    )


def _sized(experiment: Experiment) -> Experiment:
    """With as many rows of the embedding as a tokenizer that has yet to be trained will have."""
    if not isinstance(experiment.tune, Full):
        raise UserError('a plan is of a run that trains all parameters: leave --tune out')
    if experiment.model.vocab:
        return experiment
    asked = experiment.data.tokenizer
    if asked.path is not None:
        raise UserError('a plan loads no tokenizer to say what model.vocab is: give --model.vocab')
    n = bytes_tokenizer().vocab_size if asked.kind == 'bytes' else asked.vocab
    return resolved(experiment, n)


def abstract_batch(experiment: Experiment, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch: the arrays that the objective makes of a document, and their packing."""
    tokens = np.arange(32, dtype=np.int32)
    seq_len = experiment.train.seq_len
    example = pieces.examples(
        experiment.objective,
        tokens,
        tokenizer=bytes_tokenizer(),
        seq_len=seq_len,
        rng=np.random.default_rng(0),
    )[0]
    rows = packing.empty_rows(
        packing.layout_of(example, pad_id=0),
        rows=1,
        lengths=experiment.objective.lengths(seq_len),
    )
    place = NamedSharding(mesh, layout.act('BT'))
    return {
        name: jax.ShapeDtypeStruct(
            (experiment.train.batch, row.shape[1]), row.dtype, sharding=place
        )
        for name, row in rows.items()
    }


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes_of_shard(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _nonempty(mesh: Mesh) -> str:
    axes = [f'{name} {size}' for name, size in mesh.shape.items() if size > 1]
    return ' x '.join(axes) or 'one chip'


def report(plan: Plan) -> str:
    """The plan as text."""
    train, chip, memory = plan.experiment.train, plan.slice.chip, plan.memory
    tokens = train.batch * train.seq_len
    lines = [
        f'{plan.experiment.name} on {chip.name}:{"x".join(map(str, plan.slice.shape))}, '
        f'{plan.slice.chips} chips, {tokens:,} tokens a step, '
        f'{tokens // plan.slice.chips:,} a chip',
        '',
        'memory per chip',
        *(
            f'  {name:34}{n_bytes / 1e9:8.2f} GB'
            for name, n_bytes in (
                ('arguments (state, batch)', memory.arguments),
                (f'  of them {type(plan.experiment.optimizer).__name__}', memory.optimizer),
                ('outputs that reuse arguments', memory.reused_outputs),
                ('new outputs', memory.new_outputs),
                ('temporary', memory.temporary),
                ('program', memory.code),
                ('total (reused memory counts once)', memory.total),
                ('HBM', chip.hbm_bytes),
            )
        ),
        f'  {"fits" if plan.fits else "DOES NOT FIT"}: {memory.total / chip.hbm_bytes:.0%} of HBM',
        '',
        'collectives per chip and step',
        f'  {"kind":17}{"count":>6}{"over":>6}{"MB each":>10}{"GB in all":>11}  shape and place',
    ]
    small = Counter[str]()
    for c in plan.collectives:
        if c.n_bytes < 1e5:
            small[c.kind] += c.count
            continue
        shape = ', '.join(c.shapes)
        place = f'{shape if len(shape) < 60 else shape[:57] + "..."}  {c.op_name}'
        lines.append(
            f'  {c.kind + "*" * c.rewritten:17}{c.count:>6}{c.group:>6}'
            f'{c.n_bytes / 1e6:10.1f}{c.n_bytes * c.count / 1e9:11.3f}  {place}{" +" * c.inexact}'
        )
    lines += [f'  {kind:17}{n:>6}{"under 0.1":>16}' for kind, n in small.items()]
    lines += ['', 'by kind']
    for kind, n_bytes in totals(plan.collectives).items():
        lines.append(f'  {kind:17}{n_bytes / 1e9:10.3f} GB')
    if any(c.rewritten for c in plan.collectives):
        lines.append('  * written as an all-reduce of which only slices are used')
    if any(c.inexact for c in plan.collectives):
        lines.append('  + in a loop of unknown length, counted once')
    bad = plan.weights_by_all_reduce()
    lines += [
        f'WEIGHTS MOVE BY ALL-REDUCE in {len(bad)} places: is the slice a full torus?'
        if bad
        else 'weights move by all-gather, never by all-reduce',
        '',
        'kernels per step: '
        + (', '.join(f'{name} x {n}' for name, n in plan.kernels.items()) or 'none'),
        *_times(plan),
    ]
    return '\n'.join(lines)


def _ideal(plan: Plan) -> float:
    """Seconds of a step at the peak of the chips."""
    train = plan.experiment.train
    flops = flops_per_token(plan.experiment)
    return flops * train.batch * train.seq_len / plan.slice.chips / plan.slice.chip.peak_flops


def _times(plan: Plan) -> list[str]:
    chip = plan.slice.chip
    peak = f'{chip.peak_flops / 1e12:.0f} TFLOP/s'
    lines = [f'model FLOPs at the peak of {peak}: {_ideal(plan):.2f} s a step']
    if chip.clock_hz:
        lines.append(
            f"the compiler's estimate without kernels and collectives: "
            f'{plan.cycles / chip.clock_hz:.2f} s a step ({plan.cycles / 1e9:.2f}e9 cycles)'
        )
    return lines


def totals(collectives: list[Collective]) -> dict[str, int]:
    """Bytes of a step by kind, most first."""
    total = Counter[str]()
    for c in collectives:
        total[c.kind] += c.n_bytes * c.count
    return dict(total.most_common())


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return {
        'experiment': plan.experiment.name,
        'chip': plan.slice.chip.name,
        'shape': list(plan.slice.shape),
        'mesh': plan.mesh,
        'memory': {**dataclasses.asdict(plan.memory), 'total': plan.memory.total},
        'hbm': plan.slice.chip.hbm_bytes,
        'fits': plan.fits,
        'collectives': [dataclasses.asdict(c) for c in plan.collectives],
        'bytes_by_kind': totals(plan.collectives),
        'weights_by_all_reduce': len(plan.weights_by_all_reduce()),
        'kernels': plan.kernels,
        'estimated_cycles': plan.cycles,
        'compile_seconds': plan.compile_seconds,
        'jax': jax.__version__,
    }


def of_grid(plans: dict[str, Plan]) -> str:
    """What the arms of a grid take, as text."""
    width = max(map(len, plans))
    lines = [f'{"arm":{width}}  {"GB a chip":>9}  {"of HBM":>6}  {"ideal s a step":>14}']
    for name, found in plans.items():
        total, chip = found.memory.total, found.slice.chip
        lines.append(
            f'{name:{width}}  {total / 1e9:9.2f}  {total / chip.hbm_bytes:6.0%}  '
            f'{_ideal(found):14.2f}{"" if found.fits else "  DOES NOT FIT"}'
        )
    return '\n'.join(lines)


def main() -> None:
    try:
        _main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(2) from None


def _main() -> None:
    jax.config.update('jax_platforms', 'cpu')
    if sys.argv[1:2] and _is_grid(sys.argv[1]):
        return _plan_grid()
    experiment, options = cli.read(
        'tpu.plan', __doc__, topology=(str, tyro.MISSING), json=(Path | None, None)
    )
    start = time.monotonic()

    def say(line: str) -> None:
        print(f'[{time.monotonic() - start:4.0f} s] {line}', file=sys.stderr, flush=True)

    result = plan(experiment, topology.parse(options.topology), say)
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(to_dict(result), indent=1), encoding='utf-8')
    if not result.fits:
        raise SystemExit(1)


def _is_grid(name: str) -> bool:
    if own.is_file(name):
        return isinstance(own.load(name, object), Grid)
    return name in configs.grids()


def _plan_grid() -> None:
    grid, options = cli.read_grid(
        'tpu.plan',
        __doc__,
        topology=(str, tyro.MISSING),
        json=(Path | None, None),
        only=(tuple[str, ...], ()),
    )
    where, start = topology.parse(options.topology), time.monotonic()
    chosen = {run.arm for run in only(grid, runs(grid), options.only)}
    plans: dict[str, Plan] = {}
    for arm in grid.arms:
        if arm.name in chosen:

            def say(line: str, name: str = arm.name) -> None:
                told = f'[{time.monotonic() - start:4.0f} s] {name}: {line}'
                print(told, file=sys.stderr, flush=True)

            found = plan(arm.experiment, where, say)
            say(f'{found.memory.total / 1e9:.2f} of {where.chip.hbm_bytes / 1e9:.2f} GB')
            plans[arm.name] = found
    print(of_grid(plans))
    if options.json:
        told = {name: to_dict(found) for name, found in plans.items()}
        options.json.write_text(json.dumps(told, indent=1), encoding='utf-8')
    if not all(found.fits for found in plans.values()):
        raise SystemExit(1)


if __name__ == '__main__':
    main()

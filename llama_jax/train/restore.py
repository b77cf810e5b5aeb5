"""A trained model from a run's directory, for use."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jax.sharding import Mesh

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params
from llama_jax.paths import local
from llama_jax.text.files import tokenizer_of
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.checkpoint import Checkpoints, difference
from llama_jax.train.experiment import Experiment, from_dict
from llama_jax.train.plain import to_plain
from llama_jax.train.records import read_run
from llama_jax.train.step import EXTRA, State, initial_params

START_MAY_CHANGE = ('context', 'rope_theta', 'rope_scaling', 'dropout')
"""Settings of a model that has the same arrays whatever they are: with `--start`, a run may have
others than the one it begins with."""


class Trained(NamedTuple):
    experiment: Experiment
    params: Params
    """Of the backbone, stacked."""
    extra: Params
    """Of the objective."""
    tokenizer: Tokenizer
    step: int

    @property
    def config(self) -> ModelConfig:
        return self.experiment.model


class Named(NamedTuple):
    """A run, and which of its checkpoints."""

    workdir: Path
    step: int | Literal['best'] | None
    """None: the newest."""


def named(run: str | Path, what: str = '--checkpoint') -> Named:
    """What RUN, RUN@STEP or RUN@best names, where RUN is the --workdir of a training.

    `what` is the option that says so. A directory whose own name has an @ is taken by its name.
    """
    workdir = local(run, what)
    path, at, step = str(workdir).rpartition('@')
    if not at or '/' in step or workdir.is_dir():
        return Named(workdir, None)
    if step == 'best':
        return Named(Path(path), 'best')
    if not (step.isascii() and step.isdecimal()):
        raise UserError(f'{what} {run}: after @ comes the number of a step, or best')
    return Named(Path(path), int(step))


def load(
    run: str | Path, mesh: Mesh, *, shared_heads: bool = False, what: str = '--checkpoint'
) -> Trained:
    """A checkpoint of a run, see `named`, placed on `mesh`: of the newest, the first readable.

    Only the parameters are read. `shared_heads`: for generation, see `layout.check`. Raises
    UserError when there is no run, no such checkpoint, or none that can be read.
    """
    workdir, step = named(run, what)
    experiment = experiment_of(workdir)
    layout.check(experiment.model.sizes(), mesh, shared_heads=shared_heads)
    abstract = jax.eval_shape(
        lambda: initial_params(experiment.model, experiment.objective, jax.random.key(0))
    )
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        layout.shardings(abstract, mesh),
    )
    with _checkpoints(workdir) as checkpoints:
        chosen = _chosen(workdir, step, checkpoints)
        if chosen is None:
            restored = checkpoints.restore_newest({'params': placed})
            assert restored is not None  # there are some
        else:
            restored = checkpoints.restore_step(chosen, {'params': placed})
    tokenizer = tokenizer_of(workdir)
    params = dict(restored.items['params'])
    extra = params.pop(EXTRA, {})
    return Trained(experiment, params, extra, tokenizer, restored.step)


def experiment_of(workdir: Path) -> Experiment:
    """The settings of a run. Raises UserError when there is none."""
    facts = read_run(workdir)
    if facts is None:
        raise UserError(
            f'{workdir} holds no run: give the --workdir of a training, such as runs/quickstart'
        )
    return from_dict(facts['experiment'])


@contextlib.contextmanager
def _checkpoints(workdir: Path) -> Iterator[Checkpoints]:
    directory = workdir / 'checkpoints'
    if not directory.is_dir():
        raise _nothing_yet(workdir)
    checkpoints = Checkpoints(directory, keep=1, read_only=True)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _nothing_yet(workdir: Path) -> UserError:
    return UserError(f'{workdir} holds no checkpoint yet: train until the first one is saved')


def _chosen(
    workdir: Path, step: int | Literal['best'] | None, checkpoints: Checkpoints
) -> int | None:
    """The step that is meant; None: the newest. Raises UserError when there is none."""
    steps = checkpoints.steps()
    if not steps:
        raise _nothing_yet(workdir)
    if step == 'best':
        best = checkpoints.best()
        if best is None:
            raise UserError(
                f'no checkpoint in {workdir} was validated, so none is the best: name a step, such '
                f'as {workdir}@{steps[-1]} (there are {", ".join(map(str, steps))})'
            )
        return best
    if step is not None and step not in steps:
        raise UserError(
            f'{workdir} has no checkpoint of step {step}: there are those of '
            f'{", ".join(map(str, steps))}'
        )
    return step


def check_start(experiment: Experiment) -> None:
    """Raise UserError unless `experiment` can begin with the parameters of the run `start`, where
    one is named. Reads no parameters."""
    if experiment.start is None:
        return
    workdir, step = named(experiment.start, '--start')
    model = experiment_of(workdir).model
    _, fixed = _model_differences(model, experiment.model)
    if fixed:
        options = ', '.join(f'--model.{line.split(":")[0]}'.replace('_', '-') for line in fixed)
        raise UserError(
            f'--start {experiment.start} has another architecture; it differs in '
            f'{"; ".join(fixed)}: give {options} as it has'
        )
    if model.positions == 'learned' and model.context != experiment.model.context:
        raise UserError(
            f'--start {experiment.start} has learned positions, a table of {model.context} rows: '
            f'set --model.context {model.context}, for only rotary and sinusoidal positions go '
            'further'
        )
    with _checkpoints(workdir) as checkpoints:
        _chosen(workdir, step, checkpoints)


def adapted(
    state: State, experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[State, list[str]]:
    """`state` with the backbone of the run `experiment.start`, where one is named, which
    `check_start` has looked at; and what to say of it.

    Raises UserError when that run has another tokenizer.
    """
    if experiment.start is None:
        return state, []
    start = load(experiment.start, mesh, what='--start')
    if start.tokenizer.digest != tokenizer.digest:
        workdir = named(experiment.start, '--start').workdir
        raise UserError(
            f'--start {experiment.start} has another tokenizer: set --data.tokenizer.path '
            f'{workdir / start.tokenizer.FILE}'
        )
    changed, _ = _model_differences(start.config, experiment.model)
    notes = [f'begun with the parameters of {experiment.start}, step {start.step}']
    notes += [f'another setting than there: model.{line}' for line in changed]
    params = {**state.params, **start.params}
    return dataclasses.replace(state, params=params), notes


def by_tokenizer(model: ModelConfig) -> tuple[str, ...]:
    """Fields of a model that its tokenizer decides: tokenizers are compared by themselves."""
    return ('vocab_padding',) if model.vocab else ('vocab', 'vocab_padding')


def _model_differences(before: ModelConfig, after: ModelConfig) -> tuple[list[str], list[str]]:
    """Fields that differ: those of which the arrays do not depend, and the others."""
    one, other = to_plain(before), to_plain(after)
    other |= {name: one[name] for name in by_tokenizer(after)}
    lines = difference(one, other)
    free = [line for line in lines if line.split(':')[0].split('.')[0] in START_MAY_CHANGE]
    return free, [line for line in lines if line not in free]

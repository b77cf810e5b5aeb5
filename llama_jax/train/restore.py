"""A trained model from a run's directory, for use."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llama_jax import layout
from llama_jax.convert import pretrained
from llama_jax.convert.pretrained import PACKAGES
from llama_jax.data.load_tokenizer import for_model
from llama_jax.errors import UserError
from llama_jax.model.adapted import Adapted
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import TABLES, Params
from llama_jax.model.quantized import Quantized
from llama_jax.model.tune import Full, combined
from llama_jax.objectives.base import EXTRA
from llama_jax.paths import local
from llama_jax.text.files import tokenizer_of
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.base import Identity, Kept, check_identity
from llama_jax.train.checkpoint import Checkpoints, Items, Restored
from llama_jax.train.config_file import know_objectives
from llama_jax.train.experiment import Experiment, from_dict
from llama_jax.train.records import read_run
from llama_jax.train.step import initial_params
from llama_jax.trees import map_named


class Trained(NamedTuple):
    experiment: Experiment
    params: Params
    """Of the backbone, stacked; where adapters were trained, with these upon their weights."""
    extra: Params
    """Of the objective."""
    tokenizer: Tokenizer
    step: int
    identity: Identity = MappingProxyType({})
    """Of the checkpoint, for whoever begins with it; empty where it is of none."""

    @property
    def config(self) -> ModelConfig:
        return self.experiment.model


class Mean(NamedTuple):
    """The mean of the parameters of `n` checkpoints, as one of the newest of them."""

    n: int
    until: int | None = None
    """Step of the newest; None: of the run's newest."""

    def __str__(self) -> str:
        return f'mean:{self.n}'


Which = int | Literal['best'] | Mean | None
"""Of the checkpoints of a run: that of a step, the best, a mean; None: the newest."""


class Named(NamedTuple):
    """A run, and which of its checkpoints."""

    workdir: Path
    step: Which


def named(run: str | Path, what: str = '--checkpoint') -> Named:
    """What RUN, RUN@STEP, RUN@best or RUN@mean:N names, where RUN is the --workdir of a training.

    `what` is the option that says so. A directory whose own name has an @ is taken by its name.
    """
    workdir = local(run, what)
    path, at, step = str(workdir).rpartition('@')
    if not at or '/' in step or workdir.is_dir():
        return Named(workdir, None)
    if step == 'best':
        return Named(Path(path), 'best')
    number = step.removeprefix('mean:')
    if not (number.isascii() and number.isdecimal()):
        raise UserError(f'{what} {run}: after @ comes the number of a step, best, or mean:N')
    if step != number:
        if int(number) < 2:
            raise UserError(f'{what} {run}: a mean is of 2 checkpoints or more')
        return Named(Path(path), Mean(int(number)))
    return Named(Path(path), int(step))


def load(
    run: str | Path | Named, mesh: Mesh, *, shared_heads: bool = False, what: str = '--checkpoint'
) -> Trained:
    """A checkpoint of a run, see `named`, placed on `mesh`: of the newest, the first readable.

    Only the parameters are read, or their average where the run keeps one. `shared_heads`: for
    generation, see `layout.check`. Raises UserError when there is no run, no such checkpoint, or
    none that can be read.
    """
    workdir, step = run if isinstance(run, Named) else named(run, what)
    experiment = experiment_of(workdir)
    layout.check(experiment.model.sizes(), mesh, shared_heads=shared_heads)
    abstract = jax.eval_shape(
        lambda: initial_params(
            experiment.model, experiment.objective, jax.random.key(0), experiment.tune
        )
    )
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        layout.shardings(abstract, mesh),
    )
    item = 'average' if experiment.optimizer.average else 'params'
    with _checkpoints(workdir) as checkpoints:
        chosen = _chosen(workdir, step, checkpoints)
        if isinstance(step, Mean):
            restored = _mean(checkpoints, step, {item: placed})
        elif chosen is None:
            newest = checkpoints.restore_newest({item: placed})
            assert newest is not None  # there are some
            restored = newest
        else:
            restored = checkpoints.restore_step(chosen, {item: placed})
    tokenizer = for_model(
        tokenizer_of(workdir), ids=experiment.model.ids, marks=experiment.objective.marks
    )
    params, metadata = dict(restored.items[item]), restored.metadata
    extra = params.pop(EXTRA, {})
    identity = {
        'step': restored.step,
        'weights': f'{metadata["checksums"]["params"]:08x}',
        **({'mean': step.n} if isinstance(step, Mean) else {}),
    }
    if not isinstance(experiment.tune, Full):
        identity['start'] = metadata['start']
        frozen, _, _ = base(experiment, mesh, None, recorded=metadata['start'])
        params = combined(experiment.tune, params, frozen)
    return Trained(experiment, params, extra, tokenizer, restored.step, identity)


def base(
    experiment: Experiment,
    mesh: Mesh,
    compute: Compute | None,
    *,
    recorded: Identity | None,
    what: str = '--start',
) -> tuple[Params, Identity, str]:
    """The backbone that `experiment.start` names, stacked and placed, as a run keeps it which does
    not train it; its identity, and what there is to say of it. For use with `compute`, or, where
    that is None, in the type that it has there. `what` is the option that names it.

    Where the identity is recorded, of a run the checkpoint of then is read. Raises UserError when
    there is another or none.
    """
    start = experiment.start
    assert start is not None, 'see tune.check'
    workdir, _ = named(start, what)
    keep = Kept(experiment.tune, compute, mesh)
    rows, said = experiment.model.vocab, ''
    if read_run(workdir) is not None:
        which = named(start, what)
        if recorded is not None and 'step' in recorded:
            step, n = recorded['step'], recorded.get('mean')
            which = Named(workdir, Mean(n, step) if n else step)
        run = load(which, mesh, shared_heads=True, what=what)
        params, said, identity = run.params, f', step {run.step}', run.identity
        if rows > run.config.vocab:
            params = grown(params, rows, ids=run.config.ids, mesh=mesh)
        params = map_named(keep, params, is_leaf=lambda w: isinstance(w, Adapted | Quantized))
    else:
        params = pretrained.find(start, what).params(mesh, rows=rows, each=keep)
        identity = keep.identity()
    if recorded is not None:
        check_identity(recorded, identity, f'{what} {start}')
    return params, identity, said


def grown(params: Params, rows: int, *, ids: int, mesh: Mesh) -> Params:
    """Placed parameters with so many rows of embedding and head; see `pretrained.with_rows`."""
    tables = {
        name: pretrained.with_rows(_whole(params[name]), rows, ids=ids)
        for name in TABLES
        if name in params
    }
    placed = layout.shardings(tables, mesh)
    return {
        **params,
        **{
            name: jax.make_array_from_callback(x.shape, placed[name], x.__getitem__)
            for name, x in tables.items()
        },
    }


def _whole(x: jax.Array) -> np.ndarray:
    """All of an array, on every host."""
    return np.asarray(
        x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
    )


def experiment_of(workdir: Path) -> Experiment:
    """The settings of a run. Raises UserError when there is none."""
    facts = read_run(workdir)
    if facts is None:
        others = workdir.suffix == '.gguf' or str(workdir) in PACKAGES
        others |= any((workdir / name).is_file() for name in ('config.json', 'params.json'))
        raise UserError(
            f'{workdir} holds no run: '
            + (
                f'these are weights of others, for --weights {workdir} (--from of evaluate)'
                if others
                else 'give the --workdir of a training, such as runs/quickstart'
            )
        )
    know_objectives(workdir, facts, facts['experiment'])
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


def _mean(checkpoints: Checkpoints, mean: Mean, abstract: Items) -> Restored:
    """The newest checkpoint of a mean with the mean of all their arrays, and the checksum of all
    checksums."""
    *others, newest = _of_mean(checkpoints.steps(), mean)
    restored = checkpoints.restore_step(newest, abstract)
    total, sums = restored.items, [restored.metadata['checksums']['params']]
    for step in others:
        other = checkpoints.restore_step(step, abstract)
        total = jax.tree.map(jnp.add, total, other.items)
        sums.append(other.metadata['checksums']['params'])
    checksums = {'params': zlib.crc32(str(sums).encode())}
    return restored._replace(
        items=jax.tree.map(lambda x: x / mean.n, total),
        metadata={**restored.metadata, 'checksums': checksums},
    )


def _of_mean(steps: Sequence[int], mean: Mean) -> Sequence[int]:
    """Those of `steps` that a mean is of, if all are there."""
    return [step for step in steps if mean.until is None or step <= mean.until][-mean.n :]


def _chosen(workdir: Path, step: Which, checkpoints: Checkpoints) -> int | None:
    """The step that is meant; None: the newest. Raises UserError when there is none."""
    steps = checkpoints.steps()
    if not steps:
        raise _nothing_yet(workdir)
    if isinstance(step, Mean):
        of_mean = _of_mean(steps, step)
        if step.n > len(of_mean):
            raise UserError(
                f'{workdir} has {len(of_mean)} checkpoints'
                + (f' up to step {step.until}' if step.until else '')
                + f', not {step.n}: take fewer, or train with --checkpoint.keep {step.n}'
            )
        return None
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


def check_checkpoint(run: str | Path, what: str) -> None:
    """Raise UserError unless there is the checkpoint that `run` names; see `named`."""
    chosen_step(run, what)


def chosen_step(run: str | Path, what: str) -> int:
    """The step of the checkpoint that `run` names, see `named`; of a mean the newest. Raises
    UserError when there is none."""
    workdir, step = named(run, what)
    with _checkpoints(workdir) as checkpoints:
        chosen = _chosen(workdir, step, checkpoints)
        return checkpoints.steps()[-1] if chosen is None else chosen


def by_tokenizer(model: ModelConfig) -> tuple[str, ...]:
    """Fields of a model that its tokenizer decides: tokenizers are compared by themselves."""
    return ('vocab_padding',) if model.vocab else ('vocab', 'vocab_padding')

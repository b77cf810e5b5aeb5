"""A trained model from a run's directory, for use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from llama_jax import layout
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params
from llama_jax.train.checkpoint import Checkpoints, difference
from llama_jax.train.experiment import Experiment, from_dict
from llama_jax.train.plain import to_plain
from llama_jax.train.records import read_run
from llama_jax.train.step import EXTRA, State, initial_params


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


def load(workdir: Path, mesh: Mesh, *, shared_heads: bool = False) -> Trained:
    """The newest readable checkpoint of the run in `workdir`, placed on `mesh`.

    Only the parameters are read. `shared_heads`: for generation, see `layout.check`. Raises
    UserError when there is no run, or none of its checkpoints can be read.
    """
    run = read_run(workdir)
    if run is None:
        raise UserError(
            f'{workdir} holds no run: give the --workdir of a training, such as runs/quickstart'
        )
    experiment = from_dict(run['experiment'])
    layout.check(experiment.model.sizes(), mesh, shared_heads=shared_heads)
    abstract = jax.eval_shape(
        lambda: initial_params(experiment.model, experiment.objective, jax.random.key(0))
    )
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        layout.shardings(abstract, mesh),
    )
    restored = None
    directory = workdir / 'checkpoints'
    if directory.is_dir():
        checkpoints = Checkpoints(directory, keep=1, read_only=True)
        restored = checkpoints.restore_newest({'params': placed})
        checkpoints.close()
    if restored is None:
        raise UserError(f'{workdir} holds no checkpoint yet: train until the first one is saved')
    tokenizer = Tokenizer.load(str(workdir / 'tokenizer.model'))
    params = dict(restored.items['params'])
    extra = params.pop(EXTRA, {})
    return Trained(experiment, params, extra, tokenizer, restored.step)


def adapted(state: State, experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh) -> State:
    """`state` with the backbone of the run `experiment.start`, where one is named.

    Raises UserError when that run has another architecture or tokenizer.
    """
    if experiment.start is None:
        return state
    start = load(Path(experiment.start), mesh)
    lines = difference(to_plain(start.config), to_plain(experiment.model))
    if lines:
        raise UserError(
            f'--start {experiment.start} has another architecture; it differs in '
            f'{"; ".join(lines)}: use the same model settings'
        )
    if start.tokenizer.digest != tokenizer.digest:
        raise UserError(
            f'--start {experiment.start} has another tokenizer: set --data.tokenizer.path '
            f'{experiment.start}/tokenizer.model'
        )
    params = {**state.params, **start.params}
    return dataclasses.replace(state, params=params)

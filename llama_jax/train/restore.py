"""A trained model from a run's directory, for use."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from llama_jax import layout
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig, RopeScaling
from llama_jax.model.layers import Params
from llama_jax.train.checkpoint import Checkpoints
from llama_jax.train.records import read_run


class Trained(NamedTuple):
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    step: int


def load(workdir: Path, mesh: Mesh) -> Trained:
    """The newest readable checkpoint of the run in `workdir`, placed on `mesh`.

    Only the parameters are read. Raises UserError when there is no run, or none of its checkpoints
    can be read.
    """
    run = read_run(workdir)
    if run is None:
        raise UserError(
            f'{workdir} holds no run: give the --workdir of a training, such as runs/quickstart'
        )
    config = model_config(run['experiment']['model'])
    layout.check(config.sizes(), mesh)
    abstract = layers.abstract(config)
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
    return Trained(config, restored.items['params'], tokenizer, restored.step)


def model_config(saved: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that was recorded as plain values."""
    scaling = saved['rope_scaling']
    return ModelConfig(**{**saved, 'rope_scaling': scaling and RopeScaling(**scaling)})

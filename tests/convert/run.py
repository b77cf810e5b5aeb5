"""The directory of a run with random weights, as training leaves it."""

from dataclasses import replace

import jax
import numpy as np

import configs
from llama_jax import mesh as meshes
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.objectives.causal import CausalLM
from llama_jax.train.checkpoint import Checkpoints
from llama_jax.train.records import Records


def random_params(config, seed=0):
    """Well apart from one another, and from what initial values are."""
    random = np.random.RandomState(seed)

    def leaf(spec):
        scale = 1 if len(spec.shape) <= 2 and spec.shape[-1] == config.dim else 0.3
        w = random.standard_normal(spec.shape) * scale / np.sqrt(config.dim)
        return (w + (spec.ndim == 1 or spec.shape == (config.layers, config.dim))).astype('f4')

    params = jax.tree.map(leaf, layers.abstract(config))
    params['embed_VD'] = params['embed_VD'] * np.float32(4)
    return params


def experiment(config, **settings):
    """Of a run with this model."""
    return replace(configs.get('quickstart'), model=config, **settings)


def save(workdir, config, params, tokenizer, *, objective=None, step=3, metadata=None, **settings):
    """A run.json, a tokenizer and, where there are `params`, a checkpoint."""
    experiment = replace(configs.get('quickstart'), model=config, objective=objective or CausalLM())
    experiment = replace(experiment, **settings)
    workdir.mkdir(parents=True)
    Records(workdir, experiment, {}).close()
    tokenizer.save(workdir / 'tokenizer.model')
    one = meshes.make(MeshConfig(), jax.devices()[:1])
    checkpoints = Checkpoints(workdir / 'checkpoints', keep=1)
    replicated = jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
    placed = jax.device_put(params, jax.tree.map(lambda _: replicated, params))
    if params:
        checkpoints.save(step, {'params': placed}, metadata=metadata or {})
        checkpoints.wait()
    checkpoints.close()
    return workdir

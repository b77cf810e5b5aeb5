"""Initial weights, order of documents and masks have seeds of their own: each changes its part, and
nothing else."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from llama_jax import mesh
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.mesh import MeshConfig
from llama_jax.objectives.masked import MaskedLM
from llama_jax.train.checkpoint import checksum
from llama_jax.train.experiment import Randomness, check
from llama_jax.train.reading import training_loader
from llama_jax.train.run import _fresh
from tests.compare import tiny


@pytest.fixture(scope='module')
def parts(text):
    """Of an experiment: the documents of its first batch, what is masked, its weights, its key."""
    one = mesh.make(MeshConfig(), jax.devices()[:1])

    def parts(seed=0, **seeds):
        setting = tiny.experiment(
            text, objective=MaskedLM(), seed=seed, randomness=Randomness(**seeds)
        )
        check(setting, one)
        with training_loader(setting, load_tokenizer(setting.data), one, None, None) as loader:
            batch = next(iter(loader))
        state = _fresh(setting, optax.identity(), one)
        masked = np.flatnonzero(batch['weights'])
        key = jax.random.key_data(state.key).tolist()
        return batch['targets'].tolist(), masked.tolist(), checksum(state.params), key

    return parts


@pytest.mark.slow
def test_each_seed_changes_its_part_alone(parts):
    usual = parts()
    assert parts(init=0, data=0, masks=0) == usual
    text, masked, weights, key = parts(init=1)
    assert (text, masked, key) == (usual[0], usual[1], usual[3]) and weights != usual[2]
    text, masked, weights, key = parts(masks=1)
    assert (text, weights) == (usual[0], usual[2]) and masked != usual[1] and key != usual[3]
    text, masked, weights, key = parts(data=1)
    assert (weights, key) == usual[2:] and text != usual[0]
    # The seed of the experiment is that of all three.
    assert parts(seed=1) == parts(init=1, data=1, masks=1)


def test_a_seed_is_not_negative(text):
    with pytest.raises(ValueError, match='randomness.masks'):
        check(
            replace(tiny.experiment(text), randomness=Randomness(masks=-1)),
            mesh.make(MeshConfig(), jax.devices()[:1]),
        )

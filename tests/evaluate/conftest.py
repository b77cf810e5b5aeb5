"""A tiny model, and a corpus of three packages of the standard library in a cache of its own."""

import contextlib

import jax
import pytest

from llama_jax import mesh as meshes
from llama_jax.data import python_files
from llama_jax.data.config import DataConfig
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import Experiment, TrainConfig

PACKAGES = ('email', 'idlelib', 'xml')
MODEL = ModelConfig(
    vocab=512, dim=16, layers=2, heads=2, kv_heads=2, head_dim=8, ffn=32, context=64
)
COMPUTE = Compute()


@pytest.fixture(scope='session')
def packages(tmp_path_factory):
    """The modules of these packages, and a cache for what is made of them."""
    found = [
        (module, path)
        for module, path in python_files.python_files('stdlib')
        if module.split('.')[0] in PACKAGES
    ]
    return found, tmp_path_factory.mktemp('cache')


@contextlib.contextmanager
def installed(packages):
    """The installation is these packages, as far as the corpus can see."""
    found, cache = packages
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LLAMA_JAX_CACHE', str(cache))
        patch.setattr(python_files, 'python_files', lambda where: found)
        patch.setattr(python_files, 'topic_records', lambda: iter(()))
        yield


@pytest.fixture(scope='module', autouse=True)
def corpus(packages):
    """For a file of tests at a time: the next one of this process may be of another directory."""
    with installed(packages):
        yield


@pytest.fixture(scope='session')
def tokenizer(packages):
    with installed(packages):
        return load_tokenizer(data())


@pytest.fixture(scope='session')
def mesh():
    """Rows and parameters over 4 devices, heads over 2."""
    return meshes.make(MeshConfig(tensor=2))


@pytest.fixture(scope='session')
def params(mesh):
    return layers.create(MODEL, jax.random.key(0), mesh)


def data():
    return DataConfig(tokenizer=TokenizerConfig(vocab=MODEL.vocab, sample_bytes=200_000))


def experiment(objective, model=MODEL):
    return Experiment(
        name='tiny',
        model=model,
        data=data(),
        train=TrainConfig(steps=1, batch=8, seq_len=32),
        objective=objective,
        compute=COMPUTE,
    )

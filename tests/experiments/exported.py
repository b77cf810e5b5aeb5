"""A run that is exported."""

from dataclasses import replace

import pytest

from experiments import export
from llama_jax.data.train_tokenizer import train
from llama_jax.model.config import ModelConfig, RopeScaling
from tests.convert import run as runs
from tests.data.corpus import CHINESE

CONFIG = ModelConfig(
    vocab=640,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=64,
    context=256,
    rope_theta=5e5,
    rope_scaling=RopeScaling(original_context=64),
)


@pytest.fixture(scope='module')
def tokenizer():
    return train(list(CHINESE), vocab=600, kind='bpe')


@pytest.fixture(scope='module')
def run(tmp_path_factory, tokenizer):
    """A run whose vocabulary is padded, with its settings and parameters."""
    config = replace(CONFIG, vocab_padding=CONFIG.vocab - tokenizer.vocab_size)
    params = runs.random_params(config)
    path = runs.save(tmp_path_factory.mktemp('runs') / 'run', config, params, tokenizer)
    return path, config, params


def refused(run_script, *options):
    code, out, error = run_script(export.main, *options)
    assert code == 2 and len(error) == 1 and not out
    return error[0]

"""A tiny grid on real text: two arms, which differ in their z-loss."""

import os

import pytest

from llama_jax.compare import fair
from tests.compare import tiny


@pytest.fixture(scope='session', autouse=True)
def caches(tmp_path_factory):
    """Prepared data, for this process and for those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        if 'LLAMA_JAX_CACHE' not in os.environ:
            patch.setenv('LLAMA_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='session')
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp('text') / 'functions.jsonl')


@pytest.fixture(scope='session')
def grid(text):
    return tiny.grid(text)


@pytest.fixture(scope='module')
def proof(grid):
    return fair.check(grid)

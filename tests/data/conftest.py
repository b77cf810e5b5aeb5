"""A cache of its own for these tests, and small real corpora: library source and old Chinese."""

import inspect
import json
import textwrap

import pytest

from llama_jax.data.config import DataConfig, Source
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.text.tokenizer import TokenizerConfig
from tests.data.corpus import MODULES


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
    """One cache for the whole session, so that the standard library is prepared once."""
    path = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LLAMA_JAX_CACHE', str(path))
        yield path


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache for one test."""
    monkeypatch.setenv('LLAMA_JAX_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture(scope='session')
def modules(tmp_path_factory):
    """A directory with the source of some modules of the standard library."""
    path = tmp_path_factory.mktemp('modules')
    for module in MODULES:
        (path / f'{module.__name__}.py').write_text(inspect.getsource(module), 'utf-8')
    return path


@pytest.fixture(scope='session')
def config(modules, cache):
    """These modules, and a tokenizer trained on them."""
    return DataConfig(
        sources=(Source('text_files', files=(f'{modules}/*.py',)),),
        tokenizer=TokenizerConfig(vocab=1024),
    )


@pytest.fixture(scope='session')
def tokenizer(config):
    return load_tokenizer(config)


@pytest.fixture
def jsonl(tmp_path):
    """Writes documents to a .jsonl file and gives its path."""

    def write(texts, name='documents.jsonl', field='text'):
        path = tmp_path / name
        path.write_text(''.join(json.dumps({field: text}) + '\n' for text in texts), 'utf-8')
        return path

    return write


@pytest.fixture(scope='session')
def paragraphs():
    """Short documents: the docstrings of one module's functions."""
    found = [inspect.getdoc(value) for value in vars(textwrap).values() if callable(value)]
    return sorted({text for text in found if text})

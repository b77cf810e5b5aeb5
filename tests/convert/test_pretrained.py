"""Models of others by name, file or directory: what is found, and rows for more or fewer tokens."""

from dataclasses import replace

import numpy as np
import pytest

from llama_jax.convert import pretrained
from llama_jax.errors import UserError
from tests.parity.cases import CASES

CONFIG = replace(CASES['llama3'], vocab=32)


def test_rows_for_tokens_of_ours_are_the_mean_of_those_that_have_one():
    table_VD = np.array([[1, 2], [3, 4], [1000, 1000]], np.float16)  # the last is padding
    found_VD = pretrained.with_rows(table_VD, 5, ids=2)
    assert found_VD.dtype == np.float16
    np.testing.assert_array_equal(found_VD, [*table_VD, [2, 3], [2, 3]])


def test_rows_behind_the_tokens_are_padding(caplog):
    caplog.set_level('INFO', logger='llama_jax')
    padded = replace(CONFIG, vocab_padding=4)
    for config, tokens in ((CONFIG, 32), (CONFIG, 33), (padded, 28), (padded, 30)):
        assert pretrained.padded(config, tokens) is config
    assert not caplog.messages
    assert pretrained.padded(padded, 20) == replace(CONFIG, vocab_padding=12)
    assert '12 of the 32 rows of the embedding are of no token' in caplog.text


def test_weights_that_are_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGES, 'tiny', 'llm-tiny')
    with pytest.raises(UserError, match='weights of tiny are not installed: .* llm-tiny '):
        pretrained.find('tiny')
    info = tmp_path / 'llm_tiny-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n')
    (info / 'RECORD').write_text('llm_tiny/__init__.py,,\nllm_tiny/q8_0.gguf,,\n')
    (tmp_path / 'llm_tiny').mkdir()
    (tmp_path / 'llm_tiny' / 'q8_0.gguf').write_bytes(b'')
    monkeypatch.syspath_prepend(tmp_path)
    assert pretrained.packaged('tiny') == tmp_path / 'llm_tiny' / 'q8_0.gguf'
    with pytest.raises(UserError, match=r'q8_0.gguf is .*empty'):
        pretrained.find('tiny')


def test_what_is_no_model(tmp_path):
    (tmp_path / 'model.safetensors').write_text('x')
    with pytest.raises(UserError, match='is no GGUF file: name the directory that it is in'):
        pretrained.find(str(tmp_path / 'model.safetensors'))
    with pytest.raises(UserError, match="no weights are called 'smollm3': give smollm2, a .gguf"):
        pretrained.find('smollm3')

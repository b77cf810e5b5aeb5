"""A vocabulary that the tokenizer decides, and one with more rows than it has ids."""

import json
from dataclasses import replace

import jax
import pytest

from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train import loop, reading, restore
from llama_jax.train.experiment import check, resolved
from llama_jax.train.start import check_start
from tests.train.conftest import changed, one_device


def test_rows_are_those_given_or_what_the_tokenizer_needs(experiment):
    cases = ((512, 512, 0), (640, 640, 128), (0, 512, 0))
    for given, vocab, padding in cases:
        model = resolved(changed(experiment, 'model', vocab=given), 512).model
        assert (model.vocab, model.vocab_padding, model.ids) == (vocab, padding, 512)
    open_ = changed(experiment, 'model', vocab=0)
    assert resolved(open_, 32_139).model.vocab == 32_256
    assert resolved(resolved(open_, 400), 400) == resolved(open_, 400)
    assert resolved(experiment, 512) == experiment
    with pytest.raises(UserError, match='vocabulary of 512, the tokenizer one of 513'):
        resolved(experiment, 513)
    with pytest.raises(UserError, match='vocab_padding is 12, but the tokenizer has 512'):
        resolved(changed(experiment, 'model', vocab=640, vocab_padding=12), 512)


def test_a_vocabulary_left_open_on_a_mesh(experiment):
    open_ = changed(experiment, 'model', vocab=0)
    check(open_, meshes.make(MeshConfig(fsdp=1, data=-1), jax.devices()[:1]))
    odd = changed(experiment, 'model', vocab=0, heads=3, kv_heads=3, ffn=63, dim=33)
    with pytest.raises(UserError, match='model.vocab is left to the tokenizer') as caught:
        check(odd, meshes.make(MeshConfig(fsdp=1, tensor=3), jax.devices()[:3]))
    assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_a_run_goes_on_and_is_loaded_with_what_the_tokenizer_said(
    experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr(meshes, 'make', one_device)
    short = changed(experiment, 'train', steps=5, seq_len=16)
    short = changed(short, 'data', tokenizer=TokenizerConfig(kind='bytes'))
    short = changed(changed(short, 'model', vocab=0, layers=1), 'evaluation', every=0)
    loop.train(short, tmp_path)
    saved = json.loads((tmp_path / 'run.json').read_text())['experiment']['model']
    assert (saved['vocab'], saved['vocab_padding']) == (512, 512 - 399)
    loop.train(changed(short, 'train', steps=6), tmp_path)
    trained = restore.load(tmp_path, one_device(MeshConfig()))
    assert trained.step == 6 and trained.config.ids == trained.tokenizer.vocab_size == 399
    for rows in (0, 512):  # the numbers are the same, left open or given
        start = replace(changed(short, 'model', vocab=rows), start=str(tmp_path))
        check_start(start)


def test_a_tokenizer_that_does_not_fit_is_told_before_the_corpus(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, 'open_sources', lambda *_: 1 / 0)
    nowhere = changed(experiment, 'data', tokenizer=TokenizerConfig(path='nowhere.model'))
    large = changed(experiment, 'data', tokenizer=TokenizerConfig(vocab=1024))
    for bad, message in ((nowhere, 'cannot read the tokenizer'), (large, 'the model has 512 ids')):
        with pytest.raises(UserError, match=message):
            loop.train(bad, tmp_path)

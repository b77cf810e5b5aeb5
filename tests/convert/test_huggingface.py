"""Tensors of Hugging Face models: what is read, and what is refused by name."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from llama_jax.convert import huggingface, huggingface_config
from llama_jax.errors import UserError
from llama_jax.model.patterns import Dilated
from tests.parity.cases import CASES, weights

CONFIG = replace(CASES['llama3_1'], layers=2, vocab=32)
TIED = replace(CASES['llama3_2'], layers=2, vocab=32)


@pytest.mark.parametrize('config', [CONFIG, TIED], ids=['untied', 'tied'])
def test_tensors_come_back_as_they_were(config):
    tensors = weights(config, seed=3)
    params = huggingface.params_from_huggingface(tensors, config)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    back = huggingface.params_to_huggingface(params, config)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


def test_half_precision_is_read_as_float32():
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in weights(CONFIG, seed=3).items()}
    params = huggingface.params_from_huggingface(tensors, CONFIG)
    assert params['embed_VD'].dtype == np.float32
    expected = tensors['model.embed_tokens.weight'].astype(np.float32)
    np.testing.assert_array_equal(params['embed_VD'], expected)


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'model.layers.1.mlp.up_proj.weight': None}, "up_proj.weight' is missing"),
        ({'lm_head.weight': None}, "'lm_head.weight' is missing"),
        ({'model.layers.0.self_attn.q_proj.bias': np.zeros(128)}, "q_proj.bias' has no place"),
        ({'model.layers.2.mlp.up_proj.weight': np.zeros((172, 64))}, 'layers.2.mlp.up_proj'),
        ({'model.embed_tokens.weight': np.zeros((33, 64))}, 'vocab 33, the settings say 32'),
        ({'model.layers.0.self_attn.k_proj.weight': np.zeros((64, 32))}, 'k_proj'),
        ({'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(8)}, 'inv_freq'),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, named):
    tensors = {k: v for k, v in (weights(CONFIG, seed=3) | change).items() if v is not None}
    with pytest.raises(UserError) as refused:
        huggingface.params_from_huggingface(tensors, CONFIG)
    assert named in str(refused.value)


def test_copies_that_hold_nothing_new_are_accepted():
    plain = replace(CONFIG, rope_scaling=None, rope_theta=1e4)
    angles = (1e4 ** (-np.arange(0, 16, 2) / 16)).astype(np.float32)
    tensors = weights(plain, seed=3)
    buffers = {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': angles for i in range(2)}
    with_buffers = huggingface.params_from_huggingface(tensors | buffers, plain)
    without = huggingface.params_from_huggingface(tensors, plain)
    jax.tree.map(np.testing.assert_array_equal, with_buffers, without)

    tensors = weights(TIED, seed=3)
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    huggingface.params_from_huggingface(tensors, TIED)
    tensors['lm_head.weight'] = tensors['lm_head.weight'] + 1
    with pytest.raises(UserError, match='lm_head.weight'):
        huggingface.params_from_huggingface(tensors, TIED)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match='has no config.json: fetch it'):
        huggingface.load(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(b'')
    with pytest.raises(UserError, match='has no config.json: fetch it'):
        huggingface.load(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    settings = huggingface_config.config_to_huggingface(CONFIG)
    (tmp_path / 'config.json').write_text(json.dumps(settings), encoding='utf-8-sig')
    with pytest.raises(UserError, match='has no model.safetensors: fetch it'):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('', 'is empty: fetch it again'),
        ('<!DOCTYPE html>', 'is a web page'),
        ('[]', 'it holds a list and not settings by name'),
        ('null', 'it holds null and not settings'),
        ('{"vocab_size": 7', 'no JSON: Expecting'),
        ('{"vocab_size": 7, "vocab_size": 8}', "no JSON: 'vocab_size' is there twice"),
        ('[' * 100_000, 'no JSON'),
        ('Entry not found', 'no JSON'),
        ('\xff', 'no JSON'),
        ('version https://git-lfs.github.com/spec/v1', 'a pointer of git-lfs'),
    ],
)
def test_settings_that_are_damaged(tmp_path, content, words):
    (tmp_path / 'config.json').write_text(content, encoding='latin-1')
    with pytest.raises(UserError, match=words) as error:
        huggingface.load(tmp_path)
    assert str(error.value).startswith(f'{tmp_path}/config.json ')
    assert '\n' not in str(error.value)
    (tmp_path / 'config.json').unlink()
    (tmp_path / 'config.json').mkdir()
    with pytest.raises(UserError, match='config.json is a directory'):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    'change', [{'norm': 'layer'}, {'pattern': Dilated(8, 2)}, {'encoder_layers': 1}]
)
def test_other_architectures_are_refused(change):
    config = replace(CASES['llama1'], **change)
    for convert in (
        lambda: huggingface_config.config_to_huggingface(config),
        lambda: huggingface.params_to_huggingface({}, config),
        lambda: huggingface.params_from_huggingface({}, config),
    ):
        with pytest.raises(UserError, match='only decoders of the LLaMA family'):
            convert()

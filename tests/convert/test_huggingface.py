"""Settings and tensors of Hugging Face models: what is read, and what is refused by name."""

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from llama_jax.convert import huggingface
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig, RopeScaling
from llama_jax.model.patterns import Window
from tests.parity.cases import CASES, weights

CONFIG = replace(CASES['llama3_1'], layers=2, vocab=32)
TIED = replace(CASES['llama3_2'], layers=2, vocab=32)

# What the released files say (transformers 4), without weights.
LLAMA1_7B = {
    'architectures': ['LlamaForCausalLM'],
    'bos_token_id': 1,
    'eos_token_id': 2,
    'hidden_act': 'silu',
    'hidden_size': 4096,
    'initializer_range': 0.02,
    'intermediate_size': 11008,
    'max_position_embeddings': 2048,
    'model_type': 'llama',
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'pad_token_id': 0,
    'rms_norm_eps': 1e-06,
    'tie_word_embeddings': False,
    'torch_dtype': 'float16',
    'transformers_version': '4.28.0',
    'use_cache': True,
    'vocab_size': 32000,
}
LLAMA3_2_1B = LLAMA1_7B | {
    'attention_bias': False,
    'attention_dropout': 0.0,
    'head_dim': 64,
    'hidden_size': 2048,
    'intermediate_size': 8192,
    'max_position_embeddings': 131072,
    'mlp_bias': False,
    'num_hidden_layers': 16,
    'num_key_value_heads': 8,
    'pretraining_tp': 1,
    'rms_norm_eps': 1e-05,
    'rope_scaling': {
        'factor': 32.0,
        'high_freq_factor': 4.0,
        'low_freq_factor': 1.0,
        'original_max_position_embeddings': 8192,
        'rope_type': 'llama3',
    },
    'rope_theta': 500000.0,
    'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16',
    'vocab_size': 128256,
}


def test_settings_of_the_first_llama():
    assert huggingface.config_from_huggingface(LLAMA1_7B) == ModelConfig(
        vocab=32000,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        ffn=11008,
        context=2048,
        rope_theta=1e4,
        norm_eps=1e-6,
    )


def test_settings_of_llama_3_2():
    expected = ModelConfig(
        vocab=128256,
        dim=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn=8192,
        context=131072,
        rope_theta=5e5,
        rope_scaling=RopeScaling(factor=32.0, low=1.0, high=4.0, original_context=8192),
        norm_eps=1e-5,
        tied=True,
    )
    assert huggingface.config_from_huggingface(LLAMA3_2_1B) == expected
    # transformers 5 writes the same another way.
    written = huggingface.config_to_huggingface(expected)
    assert written['rope_parameters']['rope_theta'] == 5e5
    assert 'rope_scaling' not in written
    assert huggingface.config_from_huggingface(written) == expected


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'model_type': 'mistral'}, "model_type = 'mistral'"),
        ({'architectures': ['LlamaForSequenceClassification']}, 'LlamaForSequenceClassification'),
        ({'hidden_act': 'gelu'}, "hidden_act = 'gelu'"),
        ({'attention_bias': True}, 'attention_bias = True'),
        ({'mlp_bias': True}, 'mlp_bias = True'),
        ({'attention_dropout': 0.1}, 'attention_dropout = 0.1'),
        ({'sliding_window': 4096}, 'sliding_window = 4096'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config'),
        ({'num_experts': 8}, 'num_experts = 8'),
        ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_type = 'linear'"),
        ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}, "rope_type = 'yarn'"),
        ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'low_freq_factor is missing'),
        ({'rope_scaling': LLAMA3_2_1B['rope_scaling'] | {'beta': 1}}, 'rope_scaling.beta = 1'),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
        ({'num_key_value_heads': 5}, '5 key-value heads'),
        ({'vocab_size': None}, 'vocab_size is missing'),
    ],
)
def test_unsupported_setting_is_refused_by_name(change, named):
    with pytest.raises(UserError) as refused:
        huggingface.config_from_huggingface(LLAMA3_2_1B | change)
    assert named in str(refused.value)
    assert '\n' not in str(refused.value)


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
        ({'model.embed_tokens.weight': np.zeros((33, 64))}, '(33, 64), the settings say (32, 64)'),
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


@pytest.mark.parametrize(
    'change', [{'norm': 'layer'}, {'pattern': Window(8)}, {'encoder_layers': 1}]
)
def test_other_architectures_are_refused(change):
    config = replace(CASES['llama1'], **change)
    for convert in (
        lambda: huggingface.config_to_huggingface(config),
        lambda: huggingface.params_to_huggingface({}, config),
        lambda: huggingface.params_from_huggingface({}, config),
    ):
        with pytest.raises(UserError, match='only decoders of the LLaMA family'):
            convert()

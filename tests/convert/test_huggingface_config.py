"""Settings of Hugging Face models: what is read, passed over, warned of and refused."""

import logging

import pytest

from llama_jax.convert import huggingface_config, values
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig, RopeScaling
from llama_jax.model.patterns import Window

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
    assert huggingface_config.config_from_huggingface(LLAMA1_7B) == ModelConfig(
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
    assert huggingface_config.config_from_huggingface(LLAMA3_2_1B) == expected
    # transformers 5 writes the same another way.
    written = huggingface_config.config_to_huggingface(expected)
    assert written['rope_parameters']['rope_theta'] == 5e5
    # ... and transformers 4 finds its own words there.
    assert written['rope_theta'] == 5e5
    assert written['rope_scaling'] == LLAMA3_2_1B['rope_scaling']
    assert huggingface_config.config_from_huggingface(written) == expected


MISTRAL_7B = LLAMA1_7B | {
    'architectures': ['MistralForCausalLM'],
    'intermediate_size': 14336,
    'max_position_embeddings': 32768,
    'model_type': 'mistral',
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-05,
    'rope_theta': 10000.0,
}

# Keys without effect that released models have, and the tool that wrote each set.
WITHOUT_EFFECT = {
    'SmolLM2, by nanotron': {
        'is_llama_config': True,
        'rope_interleaved': False,
        'transformers.js_config': {'kv_cache_dtype': {'fp16': 'float16'}},
        'initializer_range': 0.041666666666666664,
    },
    'LLaMA 1, first conversion': {
        'architectures': ['LLaMAForCausalLM'],
        'max_sequence_length': 2048,
        'max_position_embeddings': None,
        'pad_token_id': -1,
    },
    'Vicuna': {'max_sequence_length': 2048, '_name_or_path': 'vicuna-7b', 'pretraining_tp': 2},
    'Unsloth': {'unsloth_fixed': True, 'unsloth_version': '2025.1', 'torch_dtype': 'bfloat16'},
    'transformers 4.35': {'_flash_attn_2_enabled': True, '_attn_implementation': 'sdpa'},
    'transformers 5': {
        'dtype': 'bfloat16',
        'layer_types': ['full_attention'] * 32,
        'head_dim': None,
        'return_dict': True,
        'output_attentions': False,
        'id2label': {'0': 'LABEL_0'},
        'problem_type': None,
    },
    'sampling in config.json': {'temperature': 0.6, 'top_p': 0.9, 'do_sample': True, 'top_k': 50}
    | {'max_length': 4096, 'repetition_penalty': 1.1, 'num_beams': 1, 'bad_words_ids': None},
    'tools of training': {
        'attention_dropout': 0.1,
        'hidden_dropout': 0.1,
        'neftune_noise_alpha': 5,
        'gradient_checkpointing': True,
        'use_flash_attention_2': True,
        'tokenizer_class': 'LlamaTokenizer',
        'torchscript': False,
        'model_max_length': 2048,
    },
    'switched off': {
        'hidden_act': 'swish',
        'quantization_config': None,
        'sliding_window': None,
        'use_sliding_window': False,
        'attention_bias': False,
        'mlp_bias': False,
        'partial_rotary_factor': 1.0,
        'num_experts': 0,
        'text_config': None,
        'pruned_heads': {},
        'add_cross_attention': False,
    },
    'merged after QLoRA': {
        'quantization_config': {'load_in_4bit': False, 'load_in_8bit': False},
    },
    'a window that is never left': {'sliding_window': 4096},
    'a window that is off': {'sliding_window': 512, 'use_sliding_window': False},
}


@pytest.mark.parametrize('name', WITHOUT_EFFECT)
def test_keys_without_effect_are_passed_over(caplog, name):
    settings = LLAMA1_7B | WITHOUT_EFFECT[name]
    if settings['max_position_embeddings'] is None:
        settings.pop('max_position_embeddings')
    expected = huggingface_config.config_from_huggingface(LLAMA1_7B)
    assert huggingface_config.config_from_huggingface(settings) == expected
    assert not caplog.records


def test_unknown_keys_are_told_in_one_line(caplog):
    caplog.set_level(logging.WARNING)
    expected = huggingface_config.config_from_huggingface(LLAMA1_7B)
    settings = LLAMA1_7B | {'new_key': 3, 'auto_map': {'AutoModelForCausalLM': 'a.B'}, 'none': None}
    assert huggingface_config.config_from_huggingface(settings) == expected
    assert [r.getMessage() for r in caplog.records] == [
        'config.json: auto_map, new_key not known, and ignored'
    ]


def test_what_is_not_said_is_what_transformers_takes():
    settings = {k: v for k, v in LLAMA1_7B.items() if k not in ('rms_norm_eps', 'model_type')}
    settings.pop('max_position_embeddings')
    config = huggingface_config.config_from_huggingface(settings)
    assert (config.norm_eps, config.context, config.kv_heads) == (1e-6, 2048, 32)
    with pytest.raises(UserError, match='model_type is missing'):
        huggingface_config.config_from_huggingface({'vocab_size': 32000})
    settings = {
        k: v for k, v in MISTRAL_7B.items() if k not in ('num_key_value_heads', 'model_type')
    }
    config = huggingface_config.config_from_huggingface(settings)
    assert (config.kv_heads, config.pattern, config.context) == (8, Window(4096), 32768)


def test_the_window_of_mistral(caplog):
    caplog.set_level('INFO', logger='llama_jax')

    def pattern(**changes):
        return huggingface_config.config_from_huggingface(MISTRAL_7B | changes).pattern

    dense = huggingface_config.config_from_huggingface(LLAMA1_7B).pattern
    assert pattern() == pattern(sliding_window=4096) == Window(4096)
    assert pattern(sliding_window=None) == dense  # v0.2 and v0.3
    assert not caplog.messages
    assert pattern(sliding_window=32768) == dense  # nothing is further away
    (line,) = caplog.messages
    assert 'sliding_window = 32768 is left out' in line and 'at a longer one' in line
    assert pattern(sliding_window=32767) == Window(32767)
    assert pattern(layer_types=['sliding_attention'] * 32) == Window(4096)
    for change in ({'use_sliding_window': False}, {'layer_types': ['full_attention'] * 32}):
        with pytest.raises(UserError, match=next(iter(change))):
            pattern(**change)


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'model_type': 'qwen2'}, "model_type = 'qwen2'"),
        ({'model_type': 'mllama', 'architectures': None}, "model_type = 'mllama'"),
        ({'architectures': ['LlamaForSequenceClassification']}, 'LlamaForSequenceClassification'),
        ({'architectures': ['LlavaLlamaForCausalLM']}, 'LlavaLlamaForCausalLM'),
        ({'architectures': 'LlamaForCausalLM'}, "architectures = 'LlamaForCausalLM'"),
        ({'architectures': []}, 'architectures = []'),
        ({'transformers_weights': 'ema.safetensors'}, "transformers_weights = 'ema.safetensors'"),
        ({'text_config': {'vocab_size': 7}}, "text_config = {'vocab_size': 7}"),
        ({'rope_interleaved': True}, 'rope_interleaved = True is not supported, only False'),
        ({'qkv_bias': True}, 'qkv_bias = True'),
        ({'num_local_experts': 8}, 'num_local_experts = 8'),
        ({'logit_scale': 0.25}, 'logit_scale = 0.25'),
        ({'final_logit_softcapping': 30.0}, 'final_logit_softcapping = 30.0'),
        ({'is_encoder_decoder': True}, 'is_encoder_decoder = True'),
        ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types with full'),
        ({'layer_types': 'full'}, "layer_types with 'full'"),
        ({'sliding_window': '4096'}, "sliding_window = '4096'"),
        ({'quantization_config': {'quant_method': 'gptq', 'bits': 4}}, 'says gptq of 4 bits'),
        ({'quantization_config': {'quant_method': 'fp8'}}, 'says fp8: take the repository'),
        ({'quantization_config': {'load_in_4bit': True, 'quant_method': 'bitsandbytes'}}, 'bitsan'),
        (
            {'quantization_config': {'load_in_4bit': False, 'load_in_8bit': True}},
            'quantization_config says quantised weights',
        ),
        (
            {'quantization_config': {'load_in_4bit': True, 'load_in_8bit': False}},
            'quantization_config says quantised weights',
        ),
        ({'quantization': {'group_size': 64, 'bits': 4}}, 'quantization says quantised weights of'),
        ({'vocab_size': '128256'}, "vocab_size = '128256' is no positive"),
        ({'hidden_size': 2048.5}, 'hidden_size = 2048.5 is no whole'),
        ({'num_hidden_layers': True}, 'num_hidden_layers = True'),
        ({'num_attention_heads': 0}, 'num_attention_heads = 0'),
        ({'num_attention_heads': 33, 'head_dim': None}, 'no multiple of num_attention_heads 33'),
        ({'rms_norm_eps': float('nan')}, 'rms_norm_eps = nan'),
        ({'rms_norm_eps': '1e-5'}, "rms_norm_eps = '1e-5'"),
        ({'tie_word_embeddings': 'no'}, "tie_word_embeddings = 'no'"),
        ({'hidden_act': 'gelu'}, "hidden_act = 'gelu'"),
        ({'attention_bias': True}, 'attention_bias = True'),
        ({'mlp_bias': True}, 'mlp_bias = True'),
        ({'sliding_window': 4096}, 'sliding_window = 4096'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config'),
        ({'num_experts': 8}, 'num_experts = 8'),
        ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'low_freq_factor is missing'),
        ({'rope_scaling': LLAMA3_2_1B['rope_scaling'] | {'beta': 1}}, 'rope_scaling.beta = 1'),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
        ({'num_key_value_heads': 5}, '5 key-value heads'),
        ({'vocab_size': None}, 'vocab_size is missing'),
    ],
)
def test_unsupported_setting_is_refused_by_name(change, named):
    with pytest.raises(UserError) as refused:
        huggingface_config.config_from_huggingface(LLAMA3_2_1B | change)
    assert named in str(refused.value)
    assert '\n' not in str(refused.value)


JUNK = (None, True, False, 0, -1, 1, 3.5, float('nan'), float('inf'), 10**30, 'x', '', [], [1], {})
JUNK += ('long' * 99, {'a': 1}, [None], ['LlamaForCausalLM', 3])


@pytest.mark.parametrize('base', [LLAMA3_2_1B, MISTRAL_7B], ids=['llama', 'mistral'])
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(base):
    others = ('quantization_config', 'sliding_window', 'layer_types', 'num_experts', 'pruned_heads')
    names = (*base, *others, 'use_sliding_window', 'max_sequence_length', 'rope_parameters')
    changes = [{name: value} for name in names for value in JUNK]
    rope = LLAMA3_2_1B['rope_scaling']
    changes += [{'rope_scaling': rope | {name: value}} for name in rope for value in JUNK]
    for change in changes:
        try:
            huggingface_config.config_from_huggingface(base | change)
        except UserError as error:
            assert '\n' not in str(error) and len(str(error)) < 300


def test_a_value_in_an_error_is_cut_to_60_characters():
    assert values.short('x' * 57) == repr('x' * 57)
    assert values.short('x' * 58) == f"'{'x' * 56}..."

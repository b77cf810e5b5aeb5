"""What files say of rotary positions: released spellings, both ways, and what is refused."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from llama_jax.convert import gguf_rope, huggingface_config
from llama_jax.errors import UserError
from llama_jax.model.config import Dynamic, Linear, LongRope, ModelConfig, RopeScaling, Yarn
from llama_jax.model.patterns import Dense, Window

BASE = {
    'model_type': 'llama',
    **{'vocab_size': 32000, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2},
    **{'num_attention_heads': 4, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 4096},
}
CONFIG = ModelConfig(
    vocab=32, dim=64, layers=1, heads=4, kv_heads=4, head_dim=16, ffn=64, context=32768
)
SHORT = [1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.6, 1.9]
LONG = [1.0, 1.1, 1.5, 2.5, 9.0, 20.0, 32.0, 64.0]
LONG_ROPE = LongRope(tuple(SHORT), tuple(LONG), 4096, math.sqrt(1 + math.log(32) / math.log(4096)))
FACTORS = {'short_factor': SHORT, 'long_factor': LONG}
ORIGINAL = 'original_max_position_embeddings'


def read(**settings):
    config = huggingface_config.config_from_huggingface({**BASE, **settings})
    return config.rope_theta, config.rope_scaling, config.context


# As the files of these models have it, but for the size of the heads.
RELEASED = {
    'LLaMA 1': ({'max_position_embeddings': 2048}, (1e4, None, 2048)),
    'Code Llama': (
        {'rope_theta': 1000000, 'rope_scaling': None, 'max_position_embeddings': 16384},
        (1e6, None, 16384),
    ),
    'deepseek-coder': (
        {'rope_theta': 100000, 'rope_scaling': {'factor': 4.0, 'type': 'linear'}},
        (1e5, Linear(4.0), 4096),
    ),
    'a dynamic one of transformers 4': (
        {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
        (1e4, Dynamic(2.0, 4096), 8192),
    ),
    'Yarn-Llama-2-64k': (
        {
            'max_position_embeddings': 65536,
            'rope_scaling': {'factor': 16.0, ORIGINAL: 4096, 'type': 'yarn', 'finetuned': True},
        },
        (1e4, Yarn(16.0, 4096), 65536),
    ),
    'the instructions for Qwen 2.5': (
        {'rope_scaling': {'factor': 4.0, ORIGINAL: 4096, 'rope_type': 'yarn', 'type': 'yarn'}},
        (1e4, Yarn(4.0, 4096), 16384),
    ),
    'a yarn whose factor is implied': (
        {'max_position_embeddings': 32768, 'rope_scaling': {'type': 'yarn', ORIGINAL: 4096}},
        (1e4, Yarn(8.0, 4096), 32768),
    ),
    'a yarn as DeepSeek writes it': (
        {
            'max_position_embeddings': 32768,
            'rope_scaling': {
                **{'type': 'yarn', 'factor': 8.0, ORIGINAL: 4096, 'mscale': 1.0},
                **{'mscale_all_dim': 0.707, 'beta_fast': 16, 'beta_slow': 2, 'truncate': False},
            },
        },
        (
            1e4,
            Yarn(
                *(8.0, 4096, (1 + 0.1 * math.log(8)) / (1 + 0.0707 * math.log(8))),
                **{'beta_fast': 16.0, 'beta_slow': 2.0, 'truncate': False},
            ),
            32768,
        ),
    ),
    'a yarn with its own factor of attention': (
        {
            'max_position_embeddings': 32768,
            'rope_scaling': {
                **{'type': 'yarn', 'factor': 8.0, ORIGINAL: 4096, 'attention_factor': 1.0},
                **{'mscale': 1.0, 'mscale_all_dim': 0.5},
            },
        },
        (1e4, Yarn(8.0, 4096, 1.0), 32768),
    ),
    'Phi-3': (
        {
            'max_position_embeddings': 131072,
            ORIGINAL: 4096,
            'rope_scaling': {'type': 'su', **FACTORS},
        },
        (1e4, LONG_ROPE, 131072),
    ),
    'a longrope of transformers 5': (
        {
            'max_position_embeddings': 131072,
            'rope_parameters': {
                **{'rope_type': 'longrope', 'rope_theta': 500000.0, 'factor': 32.0, ORIGINAL: 4096},
                **FACTORS,
            },
        },
        (5e5, LONG_ROPE, 131072),
    ),
    'Llama 3.2': (
        {
            'max_position_embeddings': 131072,
            'rope_theta': 500000.0,
            'rope_scaling': {
                **{'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0},
                **{ORIGINAL: 8192, 'rope_type': 'llama3'},
            },
        },
        (5e5, RopeScaling(32.0), 131072),
    ),
    'transformers 5': (
        {'rope_parameters': {'rope_type': 'default', 'rope_theta': 130000.0}},
        (1.3e5, None, 4096),
    ),
    'the theta within wins': (
        {
            'rope_theta': 1e6,
            'rope_parameters': {'rope_type': 'linear', 'rope_theta': 5e5} | {'factor': 2},
        },
        (5e5, Linear(2.0), 4096),
    ),
    'one for each type of layer': (
        {'rope_parameters': dict.fromkeys(('a', 'b'), {'rope_type': 'linear', 'factor': 3.0})},
        (1e4, Linear(3.0), 4096),
    ),
    'a default with leftovers': (
        {'rope_scaling': {'rope_type': 'default', 'factor': 8.0, 'low_freq_factor': 1.0}},
        (1e4, None, 4096),
    ),
    'words of others, of no effect': (
        {
            'rope_scaling': {
                **{'type': 'linear', 'factor': 2.0, 'attn_factor': 1.0, 'finetuned': False},
                **{'extrapolation_factor': 1.0, 'partial_rotary_factor': 1.0, 'alpha': None},
                **{'llama_4_scaling_beta': 0, 'mrope_interleaved': False},
            }
        },
        (1e4, Linear(2.0), 4096),
    ),
    'an empty one': ({'rope_scaling': {}}, (1e4, None, 4096)),
}


@pytest.mark.parametrize(('settings', 'expected'), RELEASED.values(), ids=RELEASED)
def test_spellings_of_released_files(settings, expected, caplog):
    theta, scaling, context = read(**settings)
    assert (theta, context) == (expected[0], expected[2])
    assert not caplog.records
    if isinstance(scaling, Yarn | LongRope) and scaling.attention_factor is not None:
        assert scaling.attention_factor == pytest.approx(expected[1].attention_factor, rel=1e-12)
        scaling = replace(scaling, attention_factor=expected[1].attention_factor)
    assert scaling == expected[1]


@pytest.mark.parametrize('factor', [0.5, 1.0, 1.5, 8.0])
def test_attention_of_a_longrope_that_stretches_little(factor):
    """As transformers computes it: none below a factor of 1."""
    rope = {'type': 'longrope', 'factor': factor, ORIGINAL: 4096, **FACTORS}
    expected = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(4096))
    assert read(rope_scaling=rope)[1].attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ('scaling', 'named'),
    [
        ({'type': 'mrope', 'rope_type': 'default', 'mrope_section': [2, 3, 3]}, "'mrope'"),
        ({'type': 'default', 'mrope_section': [2, 3, 3]}, 'mrope_section'),
        ({'type': 'dynamic', 'factor': 1.0, 'alpha': 1000.0}, 'alpha = 1000.0'),
        ({'type': 'ntk', 'factor': 2.0}, "rope_type = 'ntk'"),
        ({'type': 'linear', 'rope_type': 'dynamic', 'factor': 2.0}, 'different things'),
        ({'type': 'linear'}, 'rope_scaling.factor is missing'),
        ({'type': 'dynamic', 'factor': '2'}, "factor = '2' is no positive number"),
        ({'type': 'linear', 'factor': True}, 'factor = True'),
        ({'type': 'linear', 'factor': -1.0}, 'factor = -1.0'),
        ({'type': 'yarn', 'factor': 2.0, 'attn_factor': 0.8}, 'attn_factor = 0.8'),
        ({'type': 'yarn', 'factor': 2.0, ORIGINAL: 4096.5}, 'no whole number'),
        ({'type': 'yarn', 'factor': 2.0, 'truncate': 'no'}, "truncate = 'no'"),
        ({'type': 'yarn', 'factor': 2.0, 'beta_fast': 1, 'beta_slow': 2}, 'beta_fast'),
        ({'type': 'longrope', **FACTORS, 'short_mscale': 1.2}, 'short_mscale = 1.2'),
        ({'type': 'longrope', 'short_factor': SHORT}, 'long_factor is missing'),
        ({'type': 'longrope', 'short_factor': SHORT[:4], 'long_factor': LONG[:4]}, '4 factors'),
        ({'type': 'longrope', 'short_factor': SHORT, 'long_factor': LONG[:4]}, '8 and 4'),
        ({'type': 'linear', 'factor': 2.0, 'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
        ({'full': {'rope_type': 'default'}, 'sliding': {'type': 'linear', 'factor': 2.0}}, 'layer'),
        ({'full': {'rope_type': 'linear', 'factor': 2.0}, 'rope_theta': 1e4}, 'full = '),
        ({'rope_type': 2, 'factor': 2.0}, 'rope_type = 2'),
        ({'rope_type': 'default', 'type': ['linear']}, "type = ['linear']"),
        ({'type': 'longrope', **FACTORS, ORIGINAL: 1}, f'{ORIGINAL} = 1'),
        (4.0, 'rope_scaling = 4.0'),
    ],
)
def test_what_means_something_else_is_refused_by_name(scaling, named):
    with pytest.raises(UserError, match='rope_scaling') as error:
        read(rope_scaling=scaling)
    assert named in str(error.value) and '\n' not in str(error.value)


def test_two_homes_must_agree():
    one, other = {'type': 'linear', 'factor': 2.0}, {'rope_type': 'linear', 'factor': 4.0}
    assert read(rope_scaling=one, rope_parameters=one)[1] == Linear(2.0)
    with pytest.raises(UserError, match='different things'):
        read(rope_scaling=one, rope_parameters=other)


def test_an_unknown_word_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        assert read(rope_scaling={'type': 'linear', 'factor': 2.0, 'note': 1})[1] == Linear(2.0)
    assert 'rope_scaling.note = 1' in caplog.text


SCALINGS = [
    None,
    Linear(4.0),
    Dynamic(2.0, 16384),
    RopeScaling(32.0, 1.0, 4.0, 8192),
    Yarn(8.0, 4096, 1.25),
    LongRope(tuple(SHORT), tuple(LONG), 4096, 1.19),
    LongRope(tuple(LONG), tuple(LONG), 32768, 1.0),
]


@pytest.mark.parametrize('scaling', [*SCALINGS, Yarn(8.0, 4096, None, 24.0, 2.0, truncate=False)])
@pytest.mark.parametrize('pattern', [Dense(), Window(4096)], ids=['dense', 'window'])
def test_config_json_both_ways(scaling, pattern):
    config = replace(CONFIG, rope_theta=5e5, rope_scaling=scaling, pattern=pattern)
    written = huggingface_config.config_to_huggingface(config)
    assert huggingface_config.config_from_huggingface(written) == config
    # Which transformers 4 looks for beside what it belongs to: else it takes the whole context.
    original = scaling.original_context if isinstance(scaling, LongRope) else None
    assert written.get(ORIGINAL) == original
    # transformers 4 reads these, and 5 these.
    old = {name: value for name, value in written.items() if name != 'rope_parameters'}
    new = {name: v for name, v in written.items() if name not in ('rope_theta', 'rope_scaling')}
    for part in (old, new):
        assert huggingface_config.config_from_huggingface(part) == config


def from_gguf(config):
    settings, tensors = gguf_rope.to_gguf(config)
    single = {name: np.float32(v) if isinstance(v, float) else v for name, v in settings.items()}
    single = {n: float(v) if isinstance(v, np.floating) else v for n, v in single.items()}
    return gguf_rope.from_gguf(single, tensors, head_dim=config.head_dim)


@pytest.mark.parametrize('scaling', [s for s in SCALINGS if not isinstance(s, Dynamic)])
def test_gguf_both_ways(scaling):
    config = replace(CONFIG, rope_theta=5e5, rope_scaling=scaling)
    theta, found, context = from_gguf(config)
    assert (theta, context) == (5e5, 32768)
    if isinstance(scaling, Yarn):  # relative to the paper's in the file, and float32
        assert found.attention_factor == pytest.approx(1.25, rel=1e-6)
        found = replace(found, attention_factor=1.25)
    assert found == scaling


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'rope_scaling': Dynamic(2.0, 16384)}, 'no word for rope_scaling Dynamic'),
        ({'rope_scaling': Yarn(8.0, 4096, truncate=False)}, 'no word for rope_scaling Yarn'),
        ({'rope_scaling': Yarn(8.0, 4096, beta_fast=16.0)}, 'no word for rope_scaling Yarn'),
        ({'rope_scaling': Yarn(8.0, 4096, beta_slow=2.0)}, 'no word for rope_scaling Yarn'),
        ({'pattern': Window(8)}, 'Window'),
    ],
)
def test_gguf_has_no_word_for_these(change, named):
    with pytest.raises(UserError, match=named):
        gguf_rope.to_gguf(replace(CONFIG, **change))


def gguf_scaling(factors=(), **settings):
    named = {f'rope.{name.replace("__", ".")}': value for name, value in settings.items()}
    settings = {'context_length': 32768, **named}
    tensors = {name: np.asarray(value, np.float32) for name, value in dict(factors).items()}
    return gguf_rope.from_gguf(settings, tensors, head_dim=16).scaling


def test_words_of_gguf():
    # No type means linear there, and an older name has the factor; `none` overrides a factor.
    assert gguf_scaling(scaling__factor=4.0) == Linear(4.0)
    assert gguf_scaling(scale_linear=4.0) == Linear(4.0)
    assert gguf_scaling(scaling__factor=0.0, scale_linear=4.0) == Linear(4.0)
    assert gguf_scaling(scaling__type='none', scaling__factor=4.0) is None
    assert gguf_scaling(scaling__type='linear') is None
    yarn = {'scaling__type': 'yarn', 'scaling__factor': 8.0}
    standard = {'yarn_ext_factor': 1.0, 'yarn_attn_factor': 1.0, 'yarn_log_multiplier': 0.0}
    standard |= {'yarn_beta_fast': 32.0, 'yarn_beta_slow': 1.0}
    named = {f'scaling__{name}': value for name, value in standard.items()}
    assert gguf_scaling(**yarn, **named) == Yarn(8.0, 32768)
    assert gguf_scaling(**yarn) == Yarn(8.0, 32768)
    assert gguf_scaling(**yarn, scaling__original_context_length=4096) == Yarn(8.0, 4096)
    strong = gguf_scaling(**yarn, scaling__attn_factor=2.0)
    assert strong.attention_factor == pytest.approx(2 + 0.2 * math.log(8))
    # Factors of no known rule are taken as they are.
    odd = gguf_scaling({gguf_rope.FREQS: SHORT}, scaling__factor=2.0)
    assert odd.short == odd.long == tuple(2 * x for x in SHORT) and odd.attention_factor == 1
    assert gguf_scaling(scaling__attn_factor=1.5).attention_factor == 1.5
    both = {gguf_rope.LONG: LONG, gguf_rope.SHORT: SHORT}
    assert gguf_scaling(both, scaling__type='longrope', scaling__attn_factor=1.19) == LongRope(
        tuple(SHORT), tuple(LONG), 32768, 1.19
    )


@pytest.mark.parametrize(
    ('factors', 'settings', 'named'),
    [
        ({}, {'scaling__type': 'dynamic'}, "type = 'dynamic'"),
        ({}, {'scaling__type': 'longrope'}, 'rope_factors_short.weight'),
        ({gguf_rope.LONG: LONG}, {}, 'no use with'),
        ({gguf_rope.FREQS: LONG}, {'scaling__type': 'yarn', 'scaling__factor': 2.0}, 'no use with'),
        ({gguf_rope.FREQS: LONG[:4]}, {}, 'needs 8 factors'),
        ({}, {'scaling__type': 'yarn', 'scaling__yarn_ext_factor': 0.0}, 'yarn_ext_factor = 0.0'),
        ({}, {'scaling__type': 'yarn', 'scaling__yarn_attn_factor': 2.0}, 'yarn_attn_factor = 2.0'),
        ({}, {'scaling__yarn_log_multiplier': 0.1}, 'yarn_log_multiplier = 0.1'),
        ({}, {'scaling__type': 'yarn', 'scaling__yarn_beta_fast': 16.0}, 'yarn_beta_fast = 16.0'),
        ({}, {'freq_base': 0.0}, 'freq_base = 0.0'),
    ],
)
def test_gguf_refuses_by_name(factors, settings, named):
    with pytest.raises(UserError, match='GGUF') as error:
        gguf_scaling(factors, **settings)
    assert named in str(error.value)


def pattern(**settings):
    return huggingface_config.config_from_huggingface(
        {**BASE, 'max_position_embeddings': 32768, 'model_type': 'mistral', **settings}
        | {'num_key_value_heads': 4}
    ).pattern


def test_windows_of_mistral():
    assert pattern(sliding_window=4096) == Window(4096)  # v0.1
    assert pattern(sliding_window=None) == Dense()  # v0.3
    assert pattern() == Window(4096), 'what transformers takes'
    assert pattern(sliding_window=32768) == Dense(), 'wider than the context'
    types = {'layer_types': ['sliding_attention'] * 2}
    assert pattern(sliding_window=4096, **types) == Window(4096)
    assert pattern(sliding_window=None, layer_types=['full_attention'] * 2) == Dense()
    for settings in (
        {'sliding_window': None, **types},
        {'sliding_window': 4096, 'layer_types': ['full_attention', 'sliding_attention']},
        {'sliding_window': 0},
        {'sliding_window': 4096, 'model_type': 'llama'},
    ):
        with pytest.raises(UserError, match='sliding_window|layer_types'):
            pattern(**settings)

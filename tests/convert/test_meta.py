"""Meta's files: settings, names, and the order of a head's dimensions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.convert import huggingface, meta
from llama_jax.errors import UserError
from llama_jax.model.config import RopeScaling
from llama_jax.model.rope import frequencies, rotate, rotation
from tests.parity.cases import CASES, weights

CONFIG = replace(CASES['llama3_1'], layers=2, vocab=32)
TIED = replace(CASES['llama3_2'], layers=2, vocab=32)


def complex_rotation(x_TNH, config):
    """Meta's own form: neighbouring pairs of a head are complex numbers, turned by e^(i p f)."""
    angle_H = frequencies(config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
    angle_TH = np.arange(len(x_TNH))[:, None] * np.asarray(angle_H, np.float64)
    z_TNH = x_TNH[..., 0::2] + 1j * x_TNH[..., 1::2]
    return z_TNH * np.exp(1j * angle_TH)[:, None]


def test_half_split_form_of_interleaved_weights_scores_the_same():
    tensors = meta.params_to_meta(
        huggingface.params_from_huggingface(weights(CONFIG, seed=4), CONFIG), CONFIG
    )
    # Any matrix will do as Meta's: nothing here went through our own order of dimensions.
    random = np.random.default_rng(0)
    names = [f'layers.0.attention.{name}.weight' for name in ('wq', 'wk')]
    for name in names:
        tensors[name] = random.normal(size=tensors[name].shape, scale=0.1).astype(np.float32)
    N, K, H = CONFIG.heads, CONFIG.kv_heads, CONFIG.head_dim
    x_TD = random.normal(size=(20, CONFIG.dim)).astype(np.float32)
    q_TNH = (x_TD @ tensors[names[0]].T).reshape(20, N, H)
    k_TKH = (x_TD @ tensors[names[1]].T).reshape(20, K, H)
    k_TNH = np.repeat(complex_rotation(k_TKH, CONFIG), N // K, axis=1)
    expected = np.einsum('TNH,SNH->NTS', complex_rotation(q_TNH, CONFIG), k_TNH.conj()).real

    attention = meta.params_from_meta(tensors, CONFIG)['blocks']['attention']
    rope = rotation(
        jnp.arange(20)[None],
        head_dim=H,
        theta=CONFIG.rope_theta,
        scaling=CONFIG.rope_scaling,
    )
    q_BTNH = rotate(jnp.einsum('TD,DNH->TNH', x_TD, attention['q_DNH'][0])[None], rope)
    k_BTKH = rotate(jnp.einsum('TD,DKH->TKH', x_TD, attention['k_DKH'][0])[None], rope)
    k_BTNH = jnp.repeat(k_BTKH, N // K, axis=2)
    score_NTS = jnp.einsum('BTNH,BSNH->NTS', q_BTNH, k_BTNH)
    np.testing.assert_allclose(score_NTS, expected, atol=1e-4)


def test_interleaving_is_written_out():
    rows = np.arange(8)[None, :, None]
    assert meta.interleaved(rows).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert meta.half_split(meta.interleaved(rows)).ravel().tolist() == list(range(8))


@pytest.mark.parametrize('config', [CONFIG, TIED], ids=['untied', 'tied'])
def test_both_code_bases_name_the_same_parameters(config):
    tensors = weights(config, seed=5)
    params = huggingface.params_from_huggingface(tensors, config)
    theirs = meta.params_to_meta(params, config)
    assert len(theirs) == len(tensors) + config.tied  # Meta writes a tied head out
    back = meta.params_from_meta(theirs, config)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # Only the order of query and key rows differs.
    pairs = {'wv': 'self_attn.v_proj', 'wo': 'self_attn.o_proj'}
    for ours, hf in pairs.items():
        np.testing.assert_array_equal(
            theirs[f'layers.1.attention.{ours}.weight'], tensors[f'model.layers.1.{hf}.weight']
        )
    for ours, hf in {'w1': 'gate_proj', 'w2': 'down_proj', 'w3': 'up_proj'}.items():
        np.testing.assert_array_equal(
            theirs[f'layers.1.feed_forward.{ours}.weight'],
            tensors[f'model.layers.1.mlp.{hf}.weight'],
        )
    q = theirs['layers.1.attention.wq.weight']
    assert not np.array_equal(q, tensors['model.layers.1.self_attn.q_proj.weight'])


# params.json of the releases.
RELEASED = {
    'llama1_7b': (
        {'dim': 4096, 'multiple_of': 256, 'n_heads': 32, 'n_layers': 32, 'norm_eps': 1e-06}
        | {'vocab_size': -1},
        dict(vocab=32000, tied=False, context=2048, rope_factor=None),
        11008,
    ),
    'llama2_70b': (
        {'dim': 8192, 'multiple_of': 4096, 'ffn_dim_multiplier': 1.3, 'n_heads': 64}
        | {'n_kv_heads': 8, 'n_layers': 80, 'norm_eps': 1e-05, 'vocab_size': -1},
        dict(vocab=32000, tied=False, context=4096, rope_factor=None),
        28672,
    ),
    'llama3_2_1b': (
        {'dim': 2048, 'ffn_dim_multiplier': 1.5, 'multiple_of': 256, 'n_heads': 32}
        | {'n_kv_heads': 8, 'n_layers': 16, 'norm_eps': 1e-05, 'rope_theta': 500000.0}
        | {'use_scaled_rope': True, 'vocab_size': 128256},
        dict(vocab=128256, tied=True, context=131072, rope_factor=32.0),
        8192,
    ),
}


@pytest.mark.parametrize('name', RELEASED)
def test_released_settings_give_the_published_shape(name):
    settings, unsaid, ffn = RELEASED[name]
    config = meta.config_from_meta(settings, **unsaid)
    assert config.ffn == ffn
    assert config.head_dim == settings['dim'] // settings['n_heads']
    assert config.kv_heads == settings.get('n_kv_heads', settings['n_heads'])
    assert config.rope_theta == settings.get('rope_theta', 1e4)
    scaled = RopeScaling(factor=32.0) if 'use_scaled_rope' in settings else None
    assert config.rope_scaling == scaled


@pytest.mark.parametrize(
    ('name', 'settings', 'unsaid', 'named'),
    [
        ('llama3_2_1b', {}, {'rope_factor': None}, 'pass rope_factor'),
        ('llama1_7b', {}, {'rope_factor': 8.0}, 'rope_factor 8.0 must be None'),
        ('llama1_7b', {'dim': '4096'}, {}, "dim = '4096' is no positive"),
        ('llama1_7b', {'norm_eps': float('nan')}, {}, 'norm_eps = nan'),
        ('llama1_7b', {'multiple_of': None}, {}, 'multiple_of is missing'),
        ('llama3_2_1b', {'vocab_size': 128000}, {}, 'vocab_size is 128000'),
        ('llama1_7b', {'n_heads': 33}, {}, 'n_heads 33'),
    ],
)
def test_unsupported_settings_are_refused_by_name(name, settings, unsaid, named):
    released, said, _ = RELEASED[name]
    with pytest.raises(UserError, match=named):
        meta.config_from_meta(released | settings, **(said | unsaid))


def test_one_file_of_several_is_refused():
    tensors = meta.params_to_meta(
        huggingface.params_from_huggingface(weights(CONFIG, seed=4), CONFIG), CONFIG
    )
    name = 'layers.0.attention.wq.weight'
    tensors[name] = tensors[name][:64]
    with pytest.raises(UserError, match=f'{name}.*shape'):
        meta.params_from_meta(tensors, CONFIG)


def test_stored_frequencies_are_checked():
    plain = replace(CONFIG, rope_scaling=None)
    tensors = meta.params_to_meta(
        huggingface.params_from_huggingface(weights(plain, seed=4), plain), plain
    )
    angles = np.asarray(frequencies(16, theta=5e5, scaling=None))
    meta.params_from_meta(tensors | {'rope.freqs': angles}, plain)
    with pytest.raises(UserError, match='rope.freqs'):
        meta.params_from_meta(tensors | {'rope.freqs': angles * 2}, plain)

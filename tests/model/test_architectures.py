"""Choices of architecture: full and prefix visibility, features of layers, positions, biases.

Encoder-decoders are in test_encoder_decoder.py."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax import trees
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from llama_jax.optim.base import decayed
from tests.model import tiny

T = 24
LLAMA = replace(tiny.CONFIG, encoder_layers=2)
MODERN = replace(tiny.CONFIG, norm='layer', mlp='gelu', bias=True, positions='learned')
SEGMENT_T = np.repeat([1, 2, 0], [9, 10, 5])


def by_hand(config, params, token_T, seen_TS):
    """Features of the LLaMA decoder under an explicit mask: numpy, float64, a head at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    half = config.head_dim // 2
    angle = np.arange(len(token_T))[:, None] / config.rope_theta ** (np.arange(half) / half)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turned(x):
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=-1)

    x = params['embed_VD'][token_T]
    for i in range(config.layers):
        w = jax.tree.map(lambda leaf, i=i: leaf[i], params['blocks'])
        h, update = norm(x, w['attention_norm']['scale_D']), 0
        for n in range(config.heads):
            k = n // (config.heads // config.kv_heads)
            query, key = (
                turned(h @ m)
                for m in (w['attention']['q_DNH'][:, n], w['attention']['k_DKH'][:, k])
            )
            score = np.where(seen_TS, query @ key.T / config.head_dim**0.5, -np.inf)
            weight = np.exp(score - score.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            value = h @ w['attention']['v_DKH'][:, k]
            update = update + weight @ value @ w['attention']['out_NHD'][n]
        x = x + update
        h = norm(x, w['mlp_norm']['scale_D'])
        gate, up = h @ w['mlp']['gate_DF'], h @ w['mlp']['up_DF']
        x = x + gate / (1 + np.exp(-gate)) * up @ w['mlp']['down_FD']
    return norm(x, params['norm']['scale_D'])


@pytest.mark.parametrize('kind', ['causal', 'full', 'prefix'])
def test_llama_equals_its_weights_under_an_explicit_mask(kind, one_device):
    params, token_BT = tiny.parameters(tiny.CONFIG, one_device), tiny.token_ids(1, T)
    prefix_T = (np.arange(T) < 10).astype(np.int32)
    context = {
        'causal': {},
        'full': {'causal': False},
        'prefix': {'prefix_BT': prefix_T[None]},
    }[kind]
    seen_TS = np.tril(np.ones((T, T), bool))
    if kind == 'full':
        seen_TS[:] = True
    elif kind == 'prefix':
        seen_TS |= prefix_T == 1
    found = jax.jit(
        lambda params: layers.bind(tiny.CONFIG, params).features(
            token_BT, compute=tiny.REFERENCE, **context
        )[0]
    )(params)
    expected = by_hand(tiny.CONFIG, params, np.asarray(token_BT[0]), seen_TS)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('backend', ['reference', 'blocked', 'xla'])
def test_suffix_of_a_prefix_reaches_nothing_before_it(backend, one_device):
    """Two documents of a row, each with a prefix: what a changed token may move, and does."""
    params, token_BT = tiny.parameters(tiny.CONFIG, one_device), tiny.token_ids(1, T)
    prefix_T = np.isin(np.arange(T), [0, 1, 2, 3, 9, 10, 11, 12])
    compute = replace(tiny.REFERENCE, attention=backend)
    logits = jax.jit(
        lambda token_BT: tiny.model(
            *(tiny.CONFIG, params, token_BT),
            segment_BT=SEGMENT_T[None],
            prefix_BT=prefix_T.astype(np.int32)[None],
            compute=compute,
        )
    )
    before_TV = np.asarray(logits(token_BT)[0])
    for changed in (2, 6, 11, 15, 21):
        new_BT = token_BT.at[0, changed].set((token_BT[0, changed] + 1) % tiny.CONFIG.vocab)
        moved = (np.asarray(logits(new_BT)[0]) != before_TV).any(axis=-1)
        may_move = (SEGMENT_T[changed] == SEGMENT_T) & (
            prefix_T[changed] | (np.arange(T) >= changed)
        )
        np.testing.assert_array_equal(moved, may_move)


@pytest.mark.parametrize('config', [MODERN, LLAMA], ids=['decoder', 'encoder'])
def test_features_of_layers_end_in_the_features(config, one_device):
    params, token_BT = tiny.parameters(config, one_device), tiny.token_ids(2, T)
    encodes = config.encoder_layers > 0

    def read(params):
        model = layers.bind(config, params)
        context = {'segment_BT': SEGMENT_T[None].repeat(2, 0), 'compute': tiny.REFERENCE}
        x_LBTD = model.layer_features(token_BT, causal=False, **context)
        if encodes:
            memory = model.encode(
                token_BT, segment_BS=context['segment_BT'], compute=tiny.REFERENCE
            )
            return x_LBTD, model.encoder_norm(x_LBTD[-1]), memory.x_BSD
        return x_LBTD, model.norm(x_LBTD[-1]), model.features(token_BT, causal=False, **context)[0]

    x_LBTD, last, expected = jax.jit(read)(params)
    n_layers = config.encoder_layers or config.layers
    assert x_LBTD.shape == (n_layers + 1, 2, T, config.dim)
    np.testing.assert_allclose(last, expected, rtol=0, atol=1e-5)
    if config.positions == 'rope':
        np.testing.assert_array_equal(x_LBTD[0], np.asarray(params['embed_VD'])[token_BT])
    unrolled = jax.jit(read)(layers.unstack(params))[0]
    np.testing.assert_allclose(unrolled, x_LBTD, rtol=0, atol=1e-5)


@pytest.mark.parametrize('positions', ['rope', 'sinusoidal', 'learned'])
def test_positions_are_those_given(positions, one_device):
    """Two documents in a row, each from 0 on, equal each of them alone; and order matters."""
    config = replace(tiny.CONFIG, positions=positions)
    params, token_BT = tiny.parameters(config, one_device), tiny.token_ids(1, T)
    position_BT = np.concatenate([np.arange(9), np.arange(10), np.zeros(5, int)])[None]
    order_T = np.r_[9:19, 0:9, 19:T]  # the second document first
    run = jax.jit(functools.partial(tiny.model, config, params))
    packed = run(token_BT, segment_BT=SEGMENT_T[None], position_BT=position_BT)[0]
    moved = run(
        token_BT[:, order_T],
        segment_BT=SEGMENT_T[None, order_T],
        position_BT=position_BT[:, order_T],
    )[0]
    np.testing.assert_allclose(moved[:10], packed[9:19], rtol=0, atol=2e-5)
    later = run(token_BT, segment_BT=SEGMENT_T[None], position_BT=position_BT[:, ::-1])[0]
    assert np.abs(later - packed).max() > 1e-2, 'positions matter'


def test_biases_norms_and_positions_do_not_decay():
    config = replace(MODERN, encoder_layers=2)
    mask = dict(trees.named(decayed(layers.abstract(config), embeddings=False)))
    matrices = {'q_DNH', 'k_DKH', 'v_DKH', 'out_NHD', 'up_DF', 'down_FD'}
    assert {path.rsplit('.', 1)[-1] for path, on in mask.items() if on} == matrices
    assert {path.rsplit('.', 1)[-1] for path, on in mask.items() if not on} == {
        *('embed_VD', 'head_VD', 'position_CD', 'scale_D', 'bias_D', 'q_bias_NH', 'k_bias_KH'),
        *('v_bias_KH', 'out_bias_D', 'up_bias_F', 'down_bias_D'),
    }


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'head_dim': 7}, 'model.head_dim 7 is odd'),
        ({'dim': 33, 'positions': 'sinusoidal'}, 'model.dim 33 is odd'),
        ({'encoder_layers': -1}, 'model.encoder_layers is -1'),
    ],
)
def test_nonsense_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        replace(tiny.CONFIG, **changes)


def test_an_odd_head_is_fine_without_rotary_positions():
    assert isinstance(replace(tiny.CONFIG, head_dim=7, positions='learned'), ModelConfig)


def test_what_an_architecture_cannot_do_is_refused(one_device):
    token_BT = tiny.token_ids(1, 4)

    def run(config, act):
        params = tiny.parameters(config, one_device)
        jax.eval_shape(lambda params: act(layers.bind(config, params)), params)

    compute = tiny.REFERENCE
    with pytest.raises(UserError, match='call encode first'):
        run(LLAMA, lambda model: model(token_BT, compute=compute))
    with pytest.raises(UserError, match='no encoder'):
        run(tiny.CONFIG, lambda model: model.encode(token_BT, compute=compute).x_BSD)
    memory = token_BT[..., None], token_BT
    with pytest.raises(UserError, match='no encoder'):
        run(tiny.CONFIG, lambda model: model(token_BT, memory=memory, compute=compute))

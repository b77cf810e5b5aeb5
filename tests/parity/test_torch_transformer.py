"""The classic Transformer beside PyTorch's: nn.TransformerEncoder and nn.Transformer, weights
copied, on embeddings that both are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout, mesh, trees
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.positions import sinusoidal

pytestmark = pytest.mark.parity

D, N, F, V, B, S, T = 32, 4, 48, 40, 3, 11, 7
CHOICES = [('pre', 'relu'), ('post', 'relu'), ('pre', 'gelu'), ('post', 'gelu')]


def config_of(place, activation, *, encoder_layers=0, positions='learned'):
    return ModelConfig(
        *(V, D),
        layers=2,
        heads=N,
        kv_heads=N,
        head_dim=D // N,
        ffn=F,
        context=16,
        norm='layer',
        norm_place=place,
        mlp=activation,
        bias=True,
        positions=positions,
        encoder_layers=encoder_layers,
    )


def parameters(config):
    """Random everywhere, biases and scales too; learned positions are zero: PyTorch has none."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        if path == 'position_CD':
            return np.zeros(leaf.shape, np.float32)
        shift = 1.0 if 'scale' in path else 0.0
        return (shift + 0.2 * random.normal(size=leaf.shape)).astype(np.float32)

    return trees.map_named(draw, layers.abstract(config))


def copy_layer(torch_layer, block, i, *, cross):
    """Our layer `i` of stacked `block` into PyTorch's."""
    import torch

    def put(parameter, value):
        assert parameter.shape == value.shape
        with torch.no_grad():
            parameter.copy_(torch.tensor(np.ascontiguousarray(value)))

    def attention(theirs, ours):
        w = {name: value[i] for name, value in ours.items()}
        inner = [w[name].reshape(D, D).T for name in ('q_DNH', 'k_DKH', 'v_DKH')]
        biases = [w[name].reshape(D) for name in ('q_bias_NH', 'k_bias_KH', 'v_bias_KH')]
        put(theirs.in_proj_weight, np.concatenate(inner))
        put(theirs.in_proj_bias, np.concatenate(biases))
        put(theirs.out_proj.weight, w['out_NHD'].reshape(D, D).T)
        put(theirs.out_proj.bias, w['out_bias_D'])

    attention(torch_layer.self_attn, block['attention'])
    norms = (
        ['attention_norm', 'cross_norm', 'mlp_norm'] if cross else ['attention_norm', 'mlp_norm']
    )
    if cross:
        attention(torch_layer.multihead_attn, block['cross'])
    for number, name in enumerate(norms, start=1):
        theirs = getattr(torch_layer, f'norm{number}')
        put(theirs.weight, block[name]['scale_D'][i])
        put(theirs.bias, block[name]['bias_D'][i])
    put(torch_layer.linear1.weight, block['mlp']['up_DF'][i].T)
    put(torch_layer.linear1.bias, block['mlp']['up_bias_F'][i])
    put(torch_layer.linear2.weight, block['mlp']['down_FD'][i].T)
    put(torch_layer.linear2.bias, block['mlp']['down_bias_D'][i])


def final_norm(ours):
    """PyTorch's copy of a final norm, which post-norm does without."""
    import torch

    if ours is None:
        return None
    norm = torch.nn.LayerNorm(D)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(ours['scale_D']))
        norm.bias.copy_(torch.tensor(ours['bias_D']))
    return norm


def on_one_device(f, params, *arrays):
    one = mesh.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(one):
        params = jax.device_put(params, layout.shardings(params, one))
        return np.asarray(jax.jit(f)(params, *map(jnp.asarray, arrays)))


def inputs():
    """Tokens [B, S] and [B, T], and the lengths of the rows of the first."""
    random = np.random.default_rng(1)
    return random.integers(V, size=(B, S)), random.integers(V, size=(B, T)), np.array([S, 5, 8])


@pytest.mark.parametrize(('place', 'activation'), CHOICES)
def test_encoder_equals_pytorch(place, activation):
    """Our layers, not causal, with rows of several lengths."""
    import torch

    config = config_of(place, activation)
    params, (token_BS, _, length_B) = parameters(config), inputs()
    segment_BS = (np.arange(S) < length_B[:, None]).astype(np.int32)

    def features(params, token_BS, segment_BS):
        return layers.bind(config, params).features(
            token_BS, segment_BT=segment_BS, causal=False, compute=Compute()
        )[0]

    found = on_one_device(features, params, token_BS, segment_BS)
    layer = torch.nn.TransformerEncoderLayer(
        *(D, N, F), dropout=0.0, activation=activation, batch_first=True, norm_first=place == 'pre'
    )
    theirs = torch.nn.TransformerEncoder(
        layer, config.layers, norm=final_norm(params.get('norm')), enable_nested_tensor=False
    )
    for i, torch_layer in enumerate(theirs.layers):
        copy_layer(torch_layer, params['blocks'], i, cross=False)
    with torch.no_grad():
        embedded = torch.tensor(params['embed_VD'])[torch.tensor(token_BS)]
        expected = theirs(embedded, src_key_padding_mask=torch.tensor(segment_BS == 0)).numpy()
    real = segment_BS == 1
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(('place', 'activation'), CHOICES)
def test_encoder_decoder_equals_pytorch(place, activation):
    import torch

    config = config_of(place, activation, encoder_layers=3)
    params, (token_BS, token_BT, length_B) = parameters(config), inputs()
    segment_BS = (np.arange(S) < length_B[:, None]).astype(np.int32)

    def features(params, token_BS, segment_BS, token_BT):
        model = layers.bind(config, params)
        memory = model.encode(token_BS, segment_BS=segment_BS, compute=Compute())
        return model.features(token_BT, memory=memory, compute=Compute())[0]

    found = on_one_device(features, params, token_BS, segment_BS, token_BT)
    settings = dict(dropout=0.0, activation=activation, batch_first=True, norm_first=place == 'pre')
    theirs = torch.nn.Transformer(
        *(D, N, config.encoder_layers, config.layers, F),
        custom_encoder=torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(D, N, F, **settings),
            config.encoder_layers,
            norm=final_norm(params.get('encoder_norm')),
            enable_nested_tensor=False,  # else it warns that pre-norm has none
        ),
        **settings,
    )
    theirs.decoder.norm = final_norm(params.get('norm'))
    for i, torch_layer in enumerate(theirs.encoder.layers):
        copy_layer(torch_layer, params['encoder_blocks'], i, cross=False)
    for i, torch_layer in enumerate(theirs.decoder.layers):
        copy_layer(torch_layer, params['blocks'], i, cross=True)
    padding = torch.tensor(segment_BS == 0)
    with torch.no_grad():
        embed_VD = torch.tensor(params['embed_VD'])
        expected = theirs(
            embed_VD[torch.tensor(token_BS)],
            embed_VD[torch.tensor(token_BT)],
            tgt_mask=torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        ).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_sinusoids_are_those_of_pytorchs_tutorial():
    import torch

    position = torch.arange(50).unsqueeze(1)
    term = torch.exp(torch.arange(0, D, 2) * (-np.log(10000.0) / D))
    wave = torch.zeros(50, D)
    wave[:, 0::2], wave[:, 1::2] = torch.sin(position * term), torch.cos(position * term)
    found = sinusoidal(jnp.arange(50)[None], dim=D)[0]
    np.testing.assert_allclose(found, wave.numpy(), rtol=0, atol=1e-5)

"""muP: a coordinate check, and the table of rates and initial values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import mesh
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers, width
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.width import width_of
from llama_jax.objectives import latent, retromae
from llama_jax.objectives.base import Context
from llama_jax.objectives.classify import Classification
from llama_jax.objectives.latent import LatentPrediction
from llama_jax.objectives.retromae import RetroMAE
from llama_jax.objectives.reward import RewardModel
from llama_jax.objectives.rtd import ReplacedTokens
from llama_jax.optim import AdamW, Muon
from llama_jax.optim.base import optimizer
from llama_jax.optim.width import factor
from tests.objectives.pairs import place

SMALL = ModelConfig(
    vocab=64, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=32, context=16, tied=True
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 0, 64)


def wide(times, **settings):
    """The small model at a multiple of its width, by more heads."""
    return dataclasses.replace(
        SMALL, dim=16 * times, heads=2 * times, kv_heads=2 * times, ffn=32 * times, **settings
    )


def moved(config, rate=0.01, steps=3):
    """Root mean square of how far logits have moved after some steps on the same tokens."""
    params = layers.split(layers.Transformer(config, key=jax.random.key(0)))
    tx = optimizer(AdamW(clip=1e9), width_of(config))

    def logits(params):
        return layers.bind(config, params)(TOKENS, compute=Compute())[0]

    def loss(params):
        log_p = jax.nn.log_softmax(logits(params)[:, :-1])
        return -(log_p * jax.nn.one_hot(TOKENS[:, 1:], 64)).sum() / 60

    @jax.jit
    def change(params):
        def step(_, carry):
            params, state = carry
            directions, state = tx.update(jax.grad(loss)(params), state, params)
            return jax.tree.map(lambda p, d: p - rate * d, params, directions), state

        before = logits(params)
        params, _ = jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))
        return jnp.sqrt(jnp.square(logits(params) - before).mean())

    with jax.set_mesh(mesh.make(MeshConfig(), jax.devices()[:1])):
        return float(change(params))


@pytest.mark.slow
def test_how_far_logits_move_does_not_grow_with_the_width():
    base = moved(wide(1))
    assert 0.3 * base < moved(wide(8, base_dim=16)) < base
    assert moved(wide(8)) > 1.5 * base


def test_initial_values_and_rates_are_those_of_the_table():
    config = wide(4, base_dim=16)
    config = dataclasses.replace(config, heads=4, kv_heads=2, head_dim=32, base_head_dim=8)
    usual = dataclasses.replace(config, base_dim=0, base_head_dim=0)
    params, plain = (
        layers.split(layers.Transformer(c, key=jax.random.key(0))) for c in (config, usual)
    )
    width = width_of(config)
    wanted = {  # path: factor upon initial values, rate of AdamW, rate of Muon
        'embed_VD': (2.0, 1.0, 1.0),
        'norm.scale_D': (0.25, 0.25, 0.25),
        'blocks.attention.q_DNH': (0.5, 0.125, 0.25),
        'blocks.attention.out_NHD': (1.0, 0.25, 0.5),
        'blocks.mlp.down_FD': (1.0, 0.25, 0.5),
        'blocks.mlp_norm.scale_D': (1.0, 1.0, 1.0),
    }
    for path, (drawn, adamw, muon) in wanted.items():
        a, b = params, plain
        for key in path.split('.'):
            a, b = a[key], b[key]
        np.testing.assert_allclose(a, drawn * np.asarray(b), rtol=1e-6, err_msg=path)
        assert factor(path, width, power=AdamW.width_power) == pytest.approx(adamw), path
        assert factor(path, width, power=Muon.width_power) == pytest.approx(muon), path
    assert width_of(wide(1, base_dim=16)) == width_of(wide(1))  # at its own width nothing changes
    assert factor('objective.head_DC', width, power=1.0) == 1.0
    # Also where an objective has a norm before the head, and a model of its own.
    assert factor('objective.decoder.norm.scale_D', width, power=1.0) == 0.25
    assert factor('objective.decoder.mlp_norm.scale_D', width, power=1.0) == 1.0


def test_models_of_objectives_are_those_of_the_base_at_its_width():
    base, config = (wide(4, base_dim=size) for size in (64, 16))
    mae = [RetroMAE().extra(model, jax.random.key(0)) for model in (base, config)]
    scales = [tree['decoder']['norm']['scale_D'] for tree in mae]
    np.testing.assert_allclose(scales[1], 0.25 * scales[0])
    small = ReplacedTokens(generator=0.25).generator_of(config)
    assert width_of(small).ratio == width_of(config).ratio == 4
    assert ReplacedTokens(generator=0.25).generator_of(wide(4)).base_dim == 0
    with pytest.raises(UserError, match='--model.base-dim 0'):
        Classification(('a', 'b')).check(dataclasses.replace(config, encoder_layers=1))


@pytest.mark.slow
@pytest.mark.parametrize('times', [1, 4])
def test_networks_of_objectives_read_features_as_large_as_those_of_the_base(times, monkeypatch):
    """The norm before the head makes them small, for the head alone."""
    config, read = wide(times, base_dim=16), []
    ones = np.ones(TOKENS.shape, np.int32)
    batch = {'inputs': TOKENS, 'targets': TOKENS, 'segments': ones, 'weights': ones * 1.0}
    batch['positions'] = np.broadcast_to(np.arange(16), TOKENS.shape)
    project = latent.project

    def predictor(x_BTD, weight_DF, letters):
        read.append(x_BTD)
        return project(x_BTD, weight_DF, letters)

    def decoder(config, params):
        return lambda model, vector_BTD, *_, **__: read.append(vector_BTD) or vector_BTD

    monkeypatch.setattr(latent, 'project', predictor)
    monkeypatch.setattr(retromae, 'bound', decoder)
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(devices):
        params = layers.create(config, jax.random.key(0), devices)
        batch = place(batch, devices)
        for objective in (LatentPrediction(), RetroMAE(pool='first')):
            carried = objective.carried(config, params, jax.random.key(2))
            objective.loss(
                *(layers.bind(config, params), batch),
                extra=jax.jit(objective.extra, static_argnums=0)(config, jax.random.key(1)),
                compute=Compute(),
                key=None,
                context=Context(jnp.int32(0), carried),
            )
    sizes = [float(jnp.sqrt(jnp.square(x).mean())) for x in read]
    np.testing.assert_allclose(sizes, [1.0, 1.0], rtol=1e-2)


@pytest.mark.parametrize(
    'settings, said',
    [
        ({'base_head_dim': 8}, 'no effect without model.base_dim'),
        ({'base_dim': 16, 'norm_place': 'post'}, 'model.norm_place pre'),
        ({'base_dim': -1}, '0 or more'),
        ({'base_dim': 16, 'positions': 'sinusoidal'}, 'take rope or learned'),
    ],
)
def test_a_base_without_effect_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(SMALL, **settings)


def test_heads_that_no_base_can_have_are_refused():
    config = dataclasses.replace(SMALL, dim=64, heads=8, kv_heads=4, head_dim=8, base_dim=16)
    width.check(config)
    width.check(dataclasses.replace(config, base_dim=0, kv_heads=1))
    # Heads twice as large, and half as many in the base.
    width.check(dataclasses.replace(config, kv_heads=2, base_head_dim=4))
    with pytest.raises(UserError, match='4 times, and model.kv_heads 2 .* --model.kv-heads'):
        width.check(dataclasses.replace(config, kv_heads=2))


@pytest.mark.parametrize('kind', [Classification(('a', 'b')), RewardModel(), ReplacedTokens()])
def test_heads_of_objectives_are_drawn_for_the_base(kind):
    one, four = (kind.extra(wide(times, base_dim=16), jax.random.key(0)) for times in (1, 16))
    (name,) = (name for name in one if name.startswith('head_'))
    sizes = [float(jnp.std(extra[name])) for extra in (one, four)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.5)

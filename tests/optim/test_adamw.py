"""AdamW with clipping and a decay mask against a float64 one written out here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.base import decayed, optimizer
from llama_jax.optim.schedule import ScheduleConfig, schedule
from llama_jax.trees import n_bytes, named

STEPS = 12
CONFIG = AdamW(
    schedule=ScheduleConfig(peak=0.05, warmup_steps=3),
    beta1=0.8,
    beta2=0.9,
    eps=1e-3,
    weight_decay=0.3,
    clip=2.0,
)
SHAPES = {
    'embed_VD': (5, 4),
    'head_VD': (5, 4),
    'norm.scale_D': (4,),
    'blocks.norm.scale_D': (2, 4),  # stacked layers
    'blocks.attention.q_DNH': (2, 4, 2, 2),
    'blocks.mlp.down_FD': (2, 6, 4),
}


def tree(arrays):
    """Nested dict of float32 arrays from dotted names."""
    nested = {}
    for name, array in arrays.items():
        *path, last = name.split('.')
        here = nested
        for part in path:
            here = here.setdefault(part, {})
        here[last] = jnp.asarray(array, jnp.float32)
    return nested


def rate(step):
    """Warm-up over 3 steps to 0.05, then a cosine down to a tenth at step 12."""
    if step < 3:
        return 0.05 * (1 + 3 * step / 3) / 4
    return 0.05 * (0.1 + 0.9 * (1 + np.cos(np.pi * (step - 3) / 9)) / 2)


def reference(params, gradients, decayed_names):
    """Parameters after all `gradients`, and after how many steps the clipping was at work."""
    first = {name: np.zeros_like(p) for name, p in params.items()}
    second = {name: np.zeros_like(p) for name, p in params.items()}
    n_clipped = 0
    for step, grads in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        n_clipped += norm > 2.0
        for name, g in grads.items():
            g = g * min(1.0, 2.0 / norm)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            m, v = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.9 ** (step + 1))
            decay = 0.3 * params[name] if name in decayed_names else 0
            params[name] = params[name] - rate(step) * (m / (np.sqrt(v) + 1e-3) + decay)
    return params, n_clipped


def trained(config, start, gradients):
    """Parameters and the optimizer's state after all `gradients`."""
    tx, rate = optimizer(config), schedule(config.schedule, STEPS)
    params = tree(start)
    state = tx.init(params)

    @jax.jit
    def update(params, state, grads, step):
        directions, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, d: p - rate(step) * d, params, directions), state

    for step, grads in enumerate(gradients):
        params, state = update(params, state, tree(grads), step)
    return params, state


@pytest.mark.parametrize('embeddings', [False, True])
def test_equals_a_float64_adamw(embeddings):
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    gradients = [
        {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}
        for scale in rng.choice([0.03, 1.0], STEPS)
    ]
    matrices = {'blocks.attention.q_DNH', 'blocks.mlp.down_FD'}
    with_decay = matrices | ({'embed_VD', 'head_VD'} if embeddings else set())
    wanted, n_clipped = reference(dict(start), gradients, with_decay)
    assert 0 < n_clipped < STEPS

    params, _ = trained(dataclasses.replace(CONFIG, decay_embeddings=embeddings), start, gradients)
    for name, value in named(params):
        np.testing.assert_allclose(value, wanted[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_norms_and_embeddings_do_not_decay():
    model = ModelConfig(
        vocab=16, dim=8, layers=2, heads=2, kv_heads=1, head_dim=4, ffn=16, context=8
    )
    mask = dict(named(decayed(layers.abstract(model), embeddings=False)))
    assert {name for name, on in mask.items() if on} == {
        *(f'blocks.attention.{name}' for name in ('q_DNH', 'k_DKH', 'v_DKH', 'out_NHD')),
        *(f'blocks.mlp.{name}' for name in ('gate_DF', 'up_DF', 'down_FD')),
    }
    assert {name for name, on in mask.items() if not on} == {
        *('embed_VD', 'head_VD', 'norm.scale_D'),
        *('blocks.attention_norm.scale_D', 'blocks.mlp_norm.scale_D'),
    }


@pytest.mark.parametrize(
    'settings, named',
    [
        ({'beta1': 1.0}, 'beta1'),
        ({'beta2': -0.1}, 'beta2'),
        ({'beta2': 1.0}, 'beta2'),
        ({'eps': 0.0}, 'eps'),
        ({'weight_decay': -1.0}, 'weight-decay'),
        ({'clip': 0.0}, 'clip'),
        ({'moments': 'bfloat16', 'beta2': 0.999}, 'optimizer.beta2 0.999: set it to 0.99 or less'),
    ],
)
def test_nonsense_is_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        optimizer(dataclasses.replace(CONFIG, **settings))


def test_moments_of_bfloat16_take_half_the_memory_and_train_alike():
    rng = np.random.default_rng(1)
    start = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    gradients = [
        {name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(STEPS)
    ]
    exact, wide = trained(CONFIG, start, gradients)
    rounded, narrow = trained(dataclasses.replace(CONFIG, moments='bfloat16'), start, gradients)
    of_params = n_bytes(tree(start))
    assert n_bytes(wide) == 2 * of_params + 4 and n_bytes(narrow) == of_params + 4
    for (name, got), (_, wanted) in zip(named(rounded), named(exact), strict=True):
        moved = np.linalg.norm(wanted - start[name])
        assert 0 < np.linalg.norm(got - wanted) < 0.01 * moved, name


def test_the_second_moment_of_bfloat16_falls():
    """At the largest beta2 that is taken, once the gradients have become small."""
    config = dataclasses.replace(CONFIG, moments='bfloat16', beta2=0.99)
    tx = optimizer(config)
    params = {'norm': {'scale_D': jnp.ones(4)}}
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, tx.init(params), params)
    before = float(state[1].nu['norm']['scale_D'][0])
    tiny = jax.tree.map(lambda g: 1e-4 * g, grads)
    for _ in range(100):
        _, state = tx.update(tiny, state, params)
    assert float(state[1].nu['norm']['scale_D'][0]) == pytest.approx(before * 0.99**100, rel=0.35)


def test_the_state_has_one_form_whatever_may_change():
    params = tree({name: np.ones(shape) for name, shape in SHAPES.items()})
    other = dataclasses.replace(
        CONFIG, clip=0.5, weight_decay=0.0, decay_embeddings=True, beta1=0.0, beta2=0.5, eps=1.0
    )
    first, second = (optimizer(config).init(params) for config in (CONFIG, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)

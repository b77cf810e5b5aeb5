"""Multi-token prediction: heads as models of their own, targets that end with their document."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax import layout, mesh
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import HEADS
from llama_jax.objectives.base import Context
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.multi_token import MultiToken, where_heads_are
from llama_jax.objectives.softmax import cross_entropies, cross_entropy
from llama_jax.objectives.weighted import Weighted
from llama_jax.train.run import place
from tests.objectives.test_softmax import make_mesh, placed

CONFIG = ModelConfig(
    vocab=61, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=24, context=32
)
OURS = MultiToken(heads=3, decay=0.5, z_loss=0.01)
COMPUTE = Compute(attention='reference', unroll=1)
SEGMENTS = [[1] * 5 + [2] * 2 + [3] * 1 + [4] * 3, [1] * 9 + [0] * 2]


def batch():
    rng = np.random.default_rng(0)
    segment_BT = np.array(SEGMENTS, np.int32)
    weight_BT = (segment_BT > 0).astype(np.float32)
    weight_BT[1, 3] = 0  # a target that bears no loss, for whatever head
    ids = rng.integers(0, CONFIG.vocab, (2, *segment_BT.shape)).astype(np.int32)
    position_BT = np.array([[row[:i].count(s) for i, s in enumerate(row)] for row in SEGMENTS])
    return {
        **{'inputs': ids[0], 'targets': ids[1], 'weights': weight_BT},
        **{'segments': segment_BT, 'positions': position_BT.astype(np.int32)},
    }


def ahead(j):
    """Oracle: what stands j places after each target, and its weight."""
    whole = batch()
    target_BT, weight_BT = np.zeros_like(whole['targets']), np.zeros_like(whole['weights'])
    for b, i in np.ndindex(target_BT.shape):
        at = i + j
        if at < target_BT.shape[1] and SEGMENTS[b][at] == SEGMENTS[b][i]:
            target_BT[b, i], weight_BT[b, i] = whole['targets'][b, at], whole['weights'][b, at]
    return {**whole, 'targets': target_BT, 'weights': weight_BT}


def with_last(params, block):
    """The model with another last layer."""
    last = jax.tree.map(lambda x, y: x.at[-1].set(y), params['blocks'], block)
    return {**params, 'blocks': last}


@pytest.mark.slow
def test_heads_are_models_with_another_last_layer():
    """Losses, metrics and all gradients; and one head alone is the causal model, bit for bit."""
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    params = layers.create(CONFIG, jax.random.key(0), devices)
    extra = OURS.extra(CONFIG, jax.random.key(1))
    extra = jax.device_put(extra, layout.shardings(extra, devices))
    given = place(batch(), devices)
    each = [place(ahead(j), devices) for j in range(3)]

    def ours(params, extra):
        how = {'compute': COMPUTE, 'key': None}
        loss = OURS.loss(layers.bind(CONFIG, params), given, extra=extra, **how)
        return loss.total, loss

    def oracle(params, extra):
        total, losses = 0.0, []
        for j, scale in enumerate((1.0, 0.5, 0.25)):
            head = with_last(params, extra[HEADS][str(j + 1)]) if j else params
            how = {'extra': {}, 'compute': COMPUTE, 'key': None}
            losses.append(CausalLM(z_loss=0.01).loss(layers.bind(CONFIG, head), each[j], **how))
            total += scale * losses[-1].total
        return total, losses

    def alone(objective):
        def loss(params):
            one = objective.loss(
                layers.bind(CONFIG, params), given, extra={}, compute=COMPUTE, key=None
            )
            return one.total, one

        return jax.value_and_grad(loss, has_aux=True)

    @jax.jit
    def both(params, extra):
        grad = [jax.value_and_grad(f, argnums=(0, 1), has_aux=True) for f in (ours, oracle)]
        single = [alone(objective)(params) for objective in (MultiToken(heads=1), CausalLM())]
        return [f(params, extra) for f in grad], single

    with jax.set_mesh(devices):
        (((_, loss), grads), ((total, losses), expected)), single = jax.device_get(
            both(params, extra)
        )
    np.testing.assert_allclose(loss.total, total, rtol=1e-6)
    assert loss.weight == losses[0].weight == 19
    for j, one in enumerate(losses):
        name = f'_{j + 1}' if j else ''
        for metric in ('nll', 'accuracy'):
            expected_mean = one.metrics[metric] / one.weight
            np.testing.assert_allclose(loss.means()[metric + name], expected_mean, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), grads, expected)
    jax.tree.map(np.testing.assert_array_equal, *single)


@pytest.mark.parametrize(
    ('curriculum', 'active'),
    [('forward', (1, 1, 2, 2, 3, 3, 3)), ('reverse', (3, 3, 2, 2, 1, 1, 1))],
)
def test_a_curriculum_adds_or_takes_heads(curriculum, active):
    ours = MultiToken(heads=3, decay=0.5, curriculum=curriculum, curriculum_steps=6)
    for step, n in enumerate(active):
        expected = [0.5**j if j < n else 0 for j in range(3)]
        np.testing.assert_array_equal(ours.scales(Context(jnp.int32(step)).step), expected)
    np.testing.assert_array_equal(ours.scales(None), [1, 0.5, 0.25])


def test_a_run_trains_every_head_that_a_curriculum_adds():
    ours = MultiToken(heads=3, curriculum='forward', curriculum_steps=7)
    first = next(step for step in range(8) if ours.scales(jnp.int32(step))[2])
    ours.check_steps(first + 1)
    with pytest.raises(UserError, match=f'head 3 is trained from step {first} on, .* has {first}'):
        ours.check_steps(first)
    less = dataclasses.replace(ours, curriculum='reverse')
    alone = next(step for step in range(8) if not less.scales(jnp.int32(step))[1])
    less.check_steps(alone + 1)
    with pytest.raises(UserError, match=f'alone from step {alone} on, and the run has {alone}'):
        less.check_steps(alone)


def test_flops_are_those_of_more_layers_and_heads():
    more = dataclasses.replace(CONFIG, layers=CONFIG.layers + 2)
    expected = CausalLM().flops(more, 32) + 2 * 6 * CONFIG.vocab * CONFIG.dim
    assert OURS.flops(CONFIG, 32) == expected


def test_where_heads_are():
    assert where_heads_are(OURS, 'x') == (HEADS,)
    both = Weighted((CausalLM(), MultiToken(heads=1), OURS), (1.0,) * 3, (0.5, 0.25, 0.25))
    assert where_heads_are(both, 'x') == ('2', HEADS)


def test_logits_of_one_head_exist_at_a_time_and_one_gradient_of_the_output_head():
    B, T, D, V = 1, 256, 32, 20000
    devices = make_mesh('one device')

    def needed(J):
        arrays = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, placed))
            for shape, dtype, placed in (
                ((J, B, T, D), jnp.float32, layout.act('JBTD')),
                ((V, D), jnp.float32, layout.param('VD')),
                ((J, B, T), jnp.int32, layout.act('JBT')),
                ((J, B, T), jnp.float32, layout.act('JBT')),
            )
        ]

        def total(x_JBTD, head_VD, target_JBT, weight_JBT):
            scale_J = jnp.ones(J)
            return cross_entropies(x_JBTD, head_VD, target_JBT, weight_JBT, scale_J, 1e-4)[0]

        with jax.set_mesh(devices):
            compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # A sum of gradients beside the newest; that of logits would be eight times as large.
    assert needed(4) - needed(1) < 1.5 * 4 * V * D


def test_a_sum_of_cross_entropies_is_that_of_each():
    rng = np.random.default_rng(0)
    x_JBTD = rng.normal(size=(2, 8, 3, 16)).astype(np.float32)
    head_VD = rng.normal(size=(104, 16)).astype(np.float32)
    target_JBT = rng.integers(0, 104, (2, 8, 3)).astype(np.int32)
    weight_JBT = rng.choice([0, 1, 3], (2, 8, 3)).astype(np.float32)
    scale_J = jnp.array([2.0, 0.5])
    devices = make_mesh('fsdp 4 tensor 2')

    def one_by_one(*arrays):
        each = [cross_entropy(*arrays[4 * j : 4 * j + 4], 0.1, 3) for j in range(2)]
        return -3 * sum(scale * one.total for scale, one in zip(scale_J, each, strict=True))

    def together(*arrays):
        x_JBTD, target_JBT, weight_JBT = (jnp.stack([arrays[i], arrays[4 + i]]) for i in (0, 2, 3))
        total, _ = cross_entropies(x_JBTD, arrays[1], target_JBT, weight_JBT, scale_J, 0.1, 3)
        return -3 * total

    arrays = [
        x
        for j in range(2)
        for x in placed((x_JBTD[j], head_VD, target_JBT[j], weight_JBT[j]), devices)
    ]
    with jax.set_mesh(devices):
        how = {'argnums': (0, 1, 4, 5)}
        both = jax.jit(
            lambda *arrays: [jax.value_and_grad(f, **how)(*arrays) for f in (one_by_one, together)]
        )
        (total, (dx, dhead, dx2, dhead2)), (ours, grads) = jax.device_get(both(*arrays))
    np.testing.assert_allclose(ours, total, rtol=1e-6)
    for one, other in zip(grads, (dx, dhead + dhead2, dx2, 0 * dhead), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'heads': 0}, 'heads 0: predict 1 to 16'),
        ({'heads': 17}, 'heads 17'),
        ({'decay': 0.0}, 'decay is 0.0'),
        ({'heads': 1, 'decay': 0.5}, 'heads 1 has no other heads'),
        ({'curriculum': 'forward'}, 'curriculum forward over --objective.curriculum-steps 0'),
        ({'curriculum_steps': 9}, 'curriculum none over --objective.curriculum-steps 9'),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        MultiToken(**settings)

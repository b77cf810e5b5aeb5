"""Adapters upon weights: what they compute, what their gradients are, and where they lie."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import layout, trees
from llama_jax.errors import UserError
from llama_jax.generate.quantized import Quantization, quantized
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.adapted import Adapted, adapters_off, product
from llama_jax.model.config import Compute
from llama_jax.model.quantized import Quantized, dense
from llama_jax.model.tune import INPUTS, LoRA, combined, targeted, trained
from llama_jax.objectives.causal import CausalLM
from llama_jax.train.base import Kept
from llama_jax.train.place import place
from llama_jax.train.step import State, train_step
from tests.model import tiny

CONFIG, ALL = tiny.CONFIG, LoRA(rank=3, alpha=6.0)
OTHERS = replace(CONFIG, mlp='gelu', bias=True, norm='layer', encoder_layers=1)


def mesh_of(n=1, **axes):
    return make(MeshConfig(**axes), jax.devices()[:n])


def factors(config=CONFIG, tune=ALL, seed=1):
    """Both factors of each target, none of them 0."""
    shapes = jax.eval_shape(lambda: trained(tune, {}, config, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return trees.map_named(
        lambda _, x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes
    )


def is_weight(w):
    return isinstance(w, Adapted | Quantized)


def merged(params):
    """Plain arrays, by numpy in float64."""

    def one(path, w):
        if not is_weight(w):
            return w
        base = w.base if isinstance(w, Adapted) else w
        value = np.asarray(base.value, np.float64) if isinstance(base, Quantized) else base
        if isinstance(base, Quantized):
            for axis, (n, groups) in enumerate(zip(base.shape, base.scale.shape, strict=True)):
                scale = np.asarray(base.scale)
                scale = np.repeat(scale, n // groups, axis) if groups > 1 else scale
                base = replace(base, scale=scale)
            value = value * np.asarray(base.scale, np.float64)
        if isinstance(w, Adapted):
            R = w.a.shape[-1]
            a = np.asarray(w.a, np.float64).reshape(len(w.a), -1, R)
            b = np.asarray(w.b, np.float64).reshape(len(w.b), R, -1)
            value = value + w.scale * (a @ b).reshape(w.shape)
        return np.asarray(value, np.float32)

    return trees.map_named(one, params, is_leaf=is_weight)


def in_bits(params, bits):
    """The same with the matrices of the layers quantised."""
    how = Quantization(weights=bits, group=None if bits == 'int8' else 8)

    def one(path, x):
        if not path.startswith(layers.STACKS):
            return x
        return jax.lax.map(lambda w: quantized(path, w, how, whole_int4=False), x)

    return trees.map_named(one, params)


@pytest.mark.slow
@pytest.mark.parametrize('bits', [None, 'int8', 'int4'])
def test_model_and_gradients_are_those_of_the_merged_weights(bits):
    mesh = mesh_of()
    base, tokens = tiny.parameters(CONFIG, mesh), tiny.token_ids(2, 8)
    with jax.set_mesh(mesh):
        base = in_bits(base, bits) if bits else base
        loss = jax.jit(
            jax.value_and_grad(lambda f: tiny.loss(CONFIG, combined(ALL, f, base), tokens))
        )
        found, gradient = loss(factors())
        whole = merged(combined(ALL, factors(), base))
        expected, dense_gradient = jax.value_and_grad(lambda p: tiny.loss(CONFIG, p, tokens))(whole)
    tolerance = 1e-5 if bits is None else 2e-4  # a CPU splits what it multiplies integers with
    assert float(found) == pytest.approx(float(expected), rel=tolerance)
    for path in targeted(CONFIG, ('all',)):
        dW, own = dense_gradient, gradient
        f, name = factors(), path.rsplit('.', 1)[-1]
        for part in path.split('.'):
            dW, own, f = dW[part], own[part], f[part]
        n = 1 + len(INPUTS[name])
        L = dW.shape[0]
        dW = np.asarray(dW).reshape(L, int(np.prod(dW.shape[1:n])), -1)
        a, b = (next(f[key] for key in f if key[0] == factor) for factor in 'ab')
        da, db = (next(own[key] for key in own if key[0] == factor) for factor in 'ab')
        a, b = a.reshape(L, -1, 3), b.reshape(L, 3, -1)
        for got, wanted in (
            (da.reshape(a.shape), 2 * dW @ b.transpose(0, 2, 1)),
            (db.reshape(b.shape), 2 * a.transpose(0, 2, 1) @ dW),
        ):
            error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
            assert error < (2e-5 if bits is None else 3e-3), path


@pytest.mark.slow
def test_a_sharded_step_is_that_of_one_device_and_the_base_stays():
    """Factors lie by the letters of their weight; microbatches and dropout as ever."""
    results = []
    tx = optax.sgd(1.0)
    for n, axes in ((1, {}), (8, {'data': 2, 'fsdp': 2, 'tensor': 2})):
        mesh = mesh_of(n, **axes)
        given = jax.device_put(factors(), layout.shardings(factors(), mesh))
        with jax.set_mesh(mesh):
            base = jax.jit(lambda p: in_bits(p, 'int8'))(tiny.parameters(CONFIG, mesh))
            step, skipped, in_a_row = jnp.zeros((3, 1), jnp.int32)[:, 0]
            key = jax.random.key(3)
        state = State(given, tx.init(given), step, key, skipped, in_a_row, frozen=base, tune=ALL)
        before = jax.tree.map(np.array, base)
        step = train_step(
            *(CONFIG, CausalLM(), tx),
            learning_rate=lambda _: 1e-2,
            accumulate=2,
            compute=tiny.REFERENCE,
        )
        tokens = np.asarray(tiny.token_ids(8, 9))
        batch = {
            **{'inputs': tokens[:, :-1], 'targets': tokens[:, 1:]},
            **{'weights': np.ones((8, 8), np.float32), 'segments': np.ones((8, 8), np.int32)},
            'positions': np.tile(np.arange(8, dtype=np.int32), (8, 1)),
        }
        with jax.set_mesh(mesh):
            state, metrics = step(state, place(batch, mesh))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.frozen), before)
        results.append((jax.device_get(state.params), float(metrics['loss'])))
        if n > 1:
            b_RNH = state.params['blocks']['attention']['q_DNH']['b_RNH']
            assert b_RNH.sharding.spec == layout.param('LRNH')
            assert b_RNH.addressable_shards[0].data.shape[2] == CONFIG.heads // 2
    (one, loss), (many, same) = results
    assert loss == pytest.approx(same, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, many)


def test_adapters_turned_off_are_the_base_with_the_same_program():
    mesh, tokens = mesh_of(), tiny.token_ids(1, 8)
    base = tiny.parameters(CONFIG, mesh)
    with jax.set_mesh(mesh):
        model = layers.bind(CONFIG, combined(ALL, factors(), base))
        off, _ = adapters_off(model)(tokens, compute=tiny.REFERENCE)
        plain, _ = layers.bind(CONFIG, base)(tokens, compute=tiny.REFERENCE)
        on, _ = model(tokens, compute=tiny.REFERENCE)
        np.testing.assert_array_equal(off, plain)
        assert np.abs(on - plain).max() > 0.1
        with pytest.raises(UserError, match='no adapters to turn off'):
            adapters_off(layers.bind(CONFIG, base))


def test_dropout_of_each_layer_and_weight_is_its_own():
    mesh, tune = mesh_of(), replace(ALL, dropout=0.5)
    base, tokens = tiny.parameters(CONFIG, mesh), tiny.token_ids(1, 8)
    with jax.set_mesh(mesh):
        key = jax.random.key(5)
        whole = combined(tune, factors(), base, key)
        keys = [
            jax.random.key_data(w.key)
            for w in jax.tree.leaves(whole, is_leaf=is_weight)
            if isinstance(w, Adapted)
        ]
        assert len(np.unique(np.concatenate(keys), axis=0)) == CONFIG.layers * len(INPUTS)
        first, again, off = (
            float(tiny.loss(CONFIG, combined(tune, factors(), base, k), tokens))
            for k in (key, key, None)
        )
        assert (
            first
            == again
            != off
            == float(tiny.loss(CONFIG, combined(ALL, factors(), base), tokens))
        )
        x_BTD = jax.reshard(jnp.ones((1, 4, 32)), layout.act('BTD'))
        ones = replace(
            Adapted(jnp.zeros((32, 4, 8)), jnp.ones((32, 1)), jnp.ones((1, 4, 8)), key),
            dropout=0.5,
        )
        out = np.asarray(product('BTD,DNH->BTNH', x_BTD, ones, dtype=jnp.float32))
        assert set(np.unique(out)) <= set(range(0, 65, 2)), 'what is kept counts twice'
        assert 20 < out.mean() < 44 and len(np.unique(out)) > 2


@pytest.mark.slow
def test_an_encoder_decoder_of_other_layers():
    mesh = mesh_of()
    config = OTHERS
    tune = LoRA(rank=2, alpha=2.0, targets=('cross', 'encoder_blocks.attention', 'DF'))
    with jax.set_mesh(mesh):
        base = tiny.parameters(config, mesh)
        params = combined(tune, factors(config, tune), base)
        assert sorted(targeted(config, tune.targets))[0] == 'blocks.cross.k_DKH'

        def logits(params):
            model, tokens = layers.bind(config, params), tiny.token_ids(1, 6)
            memory = model.encode(tokens, compute=tiny.REFERENCE)
            return model(tokens, memory=memory, compute=tiny.REFERENCE)[0]

        np.testing.assert_allclose(logits(params), logits(merged(params)), atol=1e-4)


@pytest.mark.parametrize(
    ('target', 'names'),
    [
        ('all', 7),
        ('attention', 4),
        ('mlp', 3),
        ('q_DNH', 1),
        ('DKH', 2),
        ('blocks.mlp.down_FD', 1),
        ('NHD', 1),
    ],
)
def test_targets(target, names):
    assert len(targeted(CONFIG, (target,))) == names


@pytest.mark.parametrize('target', ['D', 'embed_VD', 'cross', 'mlp_norm', 'blocks.0', '', 'q_proj'])
def test_a_target_that_names_nothing(target):
    with pytest.raises(UserError, match=r'names no weight .*: there are all, .*q_DNH'):
        targeted(CONFIG, ('mlp', target))


def test_a_base_of_int4_is_taken_by_a_program_compiled_before():
    mesh = mesh_of()
    x = jax.device_put(tiny.parameters(CONFIG, mesh)['blocks']['mlp']['up_DF'] + 0)
    with jax.set_mesh(mesh):
        how = Quantization(weights='int4')
        whole = [dense(quantized('up_DF', w, how, whole_int4=False), jnp.float32) for w in x]
    w = Kept(LoRA(base='int4'), None, mesh)('blocks.mlp.up_DF', x)
    assert np.abs(w.value).max() == 7 and w.scale.shape == (2, 1, 48)
    with jax.set_mesh(mesh):
        make = jax.jit(lambda w: jax.lax.map(lambda w: dense(w, jnp.float32), w))
        np.testing.assert_array_equal(make.lower(w).compile()(w), np.stack(whole))


def test_what_a_kept_weight_is_made_of_is_let_go():
    """Or a base would need room twice; what is kept as it was stays."""
    mesh = mesh_of()
    keep = Kept(ALL, Compute(precision='bfloat16'), mesh)
    base = jax.tree.map(jnp.copy, tiny.parameters(CONFIG, mesh))
    whole = combined(ALL, jax.device_put(factors()), base)
    plain, adapted = base['embed_VD'], whole['blocks']['mlp']['up_DF']
    parts = jax.tree.leaves((plain, adapted))
    assert keep('embed_VD', plain).dtype == jnp.bfloat16
    assert keep('blocks.mlp.up_DF', adapted).dtype == jnp.bfloat16
    assert len(parts) == 4 and all(part.is_deleted() for part in parts)
    scale = base['norm']['scale_D']
    assert keep('norm.scale_D', scale) is scale and not scale.is_deleted()

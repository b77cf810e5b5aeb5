"""Adapters upon weights: what they compute, what their gradients are, and where they lie."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax import trees
from llama_jax.generate.quantized import Quantization, quantized
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.adapted import Adapted
from llama_jax.model.quantized import Quantized
from llama_jax.model.tune import INPUTS, LoRA, combined, targeted
from tests.model import tiny

CONFIG, ALL = tiny.CONFIG, LoRA(rank=3, alpha=6.0)
OTHERS = replace(CONFIG, mlp='gelu', bias=True, norm='layer', encoder_layers=1)


def mesh_of(n=1, **axes):
    return make(MeshConfig(**axes), jax.devices()[:n])


def factors(config=CONFIG, tune=ALL, seed=1):
    """Both factors of each target, none of them 0."""
    shapes = jax.eval_shape(lambda: _trained(tune, config))
    rng = np.random.default_rng(seed)
    return trees.map_named(
        lambda _, x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes
    )


def _trained(tune, config):
    from llama_jax.model.tune import trained

    return trained(tune, {}, config, jax.random.key(0))


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

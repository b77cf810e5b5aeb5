"""Muon, Lion and Adafactor against float64 ones written out here for one matrix, on a mesh: stacked
layers are one by one, heads are one matrix, whatever the placement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout, mesh
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.optim import REGISTRY, Adafactor, AdamW, Lion, Muon
from llama_jax.optim.base import optimizer
from llama_jax.train.checkpoint import Checkpoints
from llama_jax.trees import map_named, n_bytes, named

D, N, H, F, V, L = 8, 2, 4, 12, 16, 3
PARAMS = {
    'blocks': {
        'attention': {
            'q_DNH': np.zeros((L, D, N, H)),
            'out_NHD': np.zeros((L, N, H, D)),
            'q_bias_NH': np.zeros((L, N, H)),
        },
        'norm': {'scale_D': np.zeros((L, D))},
    },
    'embed_VD': np.zeros((V, D)),
    'objective': {'blocks': {'down_FD': np.zeros((F, D))}, 'head_DC': np.zeros((D, 2))},
}
HIDDEN = {'q_DNH': (D, N * H), 'out_NHD': (N * H, D), 'down_FD': (F, D)}
DECAYED = {*HIDDEN}
RATE, DECAY, STEPS = 0.1, 0.3, 3
EVERY = {
    'adamw': AdamW(weight_decay=DECAY, clip=1e9, beta1=0.8, beta2=0.9, eps=1e-3),
    'muon': Muon(weight_decay=DECAY, clip=1e9, beta=0.9, beta1=0.8, beta2=0.9, eps=1e-3),
    'lion': Lion(weight_decay=DECAY, clip=1e9, beta1=0.8, beta2=0.9),
    'adafactor': Adafactor(weight_decay=DECAY, clip=1e9, momentum='float32', clip_rms=0.9),
}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)


def newton_schulz(x):
    """Jordan et al. 2024: five steps of the odd polynomial, from the Frobenius norm 1."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def adamw(g, m, t):
    m['m'], m['v'] = 0.8 * m.get('m', 0) + 0.2 * g, 0.9 * m.get('v', 0) + 0.1 * g**2
    return m['m'] / (1 - 0.8**t) / (np.sqrt(m['v'] / (1 - 0.9**t)) + 1e-3)


def muon(g, m, t):
    if g.ndim < 2:
        return adamw(g, m, t)
    m['m'] = 0.9 * m.get('m', 0) + g
    return 0.2 * np.sqrt(max(g.shape)) * newton_schulz(0.9 * m['m'] + g)


def lion(g, m, t):
    direction = np.sign(0.8 * m.get('m', 0) + 0.2 * g)
    m['m'] = 0.9 * m.get('m', 0) + 0.1 * g
    return direction


def adafactor(g, m, t):
    kept, square = 1 - t**-0.8, g**2 + 1e-30
    if g.ndim < 2:
        m['v'] = kept * m.get('v', 0) + (1 - kept) * square
        u = g / np.sqrt(m['v'])
    else:
        m['r'] = kept * m.get('r', 0) + (1 - kept) * square.mean(1)
        m['c'] = kept * m.get('c', 0) + (1 - kept) * square.mean(0)
        u = g / np.sqrt(np.outer(m['r'], m['c']) / m['r'].mean())
    u = u / max(1, np.sqrt((u**2).mean()) / 0.9)
    m['m'] = 0.9 * m.get('m', 0) + 0.1 * u
    return m['m']


REFERENCE = {'adamw': adamw, 'muon': muon, 'lion': lion, 'adafactor': adafactor}


def reference(name, start, gradients):
    """Parameters after all gradients, each layer by itself, as a matrix where it is one."""

    def alone(path, p, *gs):
        kind = path.rsplit('.', 1)[-1]
        shape = HIDDEN.get(kind)
        if shape is None and name == 'adafactor' and kind in ('embed_VD', 'head_DC'):
            shape = p.shape
        stacked = path.startswith('blocks')
        layers = []
        for i in range(L if stacked else 1):
            one, *each = (np.asarray(x[i] if stacked else x, np.float64) for x in (p, *gs))
            one, memory = one.reshape(shape or -1), {}
            for t, g in enumerate(each, 1):
                decay = DECAY * one if kind in DECAYED else 0
                one = one - RATE * (REFERENCE[name](g.reshape(one.shape), memory, t) + decay)
            layers.append(one)
        return np.stack(layers).reshape(p.shape)

    return map_named(alone, start, *gradients)


@pytest.fixture(scope='module')
def devices():
    return mesh.make(MeshConfig(fsdp=4, tensor=2))


def test_what_muon_does_not_orthogonalise_has_the_defaults_of_adamw():
    config, usual = Muon(), AdamW()
    for name in ('beta1', 'beta2', 'eps', 'moments'):
        assert getattr(config, name) == getattr(usual, name)


@pytest.mark.parametrize('name', REGISTRY)
def test_equals_one_of_float64_layer_by_layer_on_a_mesh(name, devices, tmp_path):
    tx = optimizer(EVERY[name])
    start, gradients = drawn(0), [drawn(seed) for seed in range(1, 1 + STEPS)]
    abstract = jax.eval_shape(tx.init, start)
    place = layout.shardings((start, abstract), devices)
    params = jax.device_put(start, place[0])

    def update(params, state, grads):
        directions, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, d: p - RATE * d, params, directions), state

    with jax.set_mesh(devices):
        state = jax.jit(tx.init, out_shardings=place[1])(params)
        step = jax.jit(update).lower(params, state, params).compile()
        for grads in gradients:
            params, state = step(params, state, jax.device_put(grads, place[0]))
    wanted = dict(named(reference(name, start, gradients)))
    for path, got in named(params):
        np.testing.assert_allclose(got, wanted[path], rtol=2e-4, atol=2e-5, err_msg=path)
    # The state lies as it is placed, and in a checkpoint it is what it was.
    for (path, x), (_, at) in zip(named(state), named(place[1]), strict=True):
        assert x.sharding.is_equivalent_to(at, x.ndim), path
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {'rest': state}, metadata={})
    checkpoints.wait()
    shapes = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, place[1]
    )
    restored = checkpoints.restore_newest({'rest': shapes})
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored.items['rest'], state)
    if name == 'muon':  # layers change places with what divides them, and are never gathered
        text = step.as_text()
        assert 'all-to-all' in text and 'all-gather' not in text


@pytest.mark.parametrize('name', REGISTRY)
@pytest.mark.parametrize(
    'axes', [MeshConfig(fsdp=1), MeshConfig(fsdp=8), MeshConfig(data=4, fsdp=1, tensor=2)], ids=str
)
def test_it_is_traced_on_any_mesh(name, axes):
    """Where axes are of one device, dimensions are divided over them by type all the same."""
    tx = optimizer(EVERY[name])
    devices = mesh.make(axes, jax.devices()[: axes.data * axes.fsdp * axes.tensor])
    start = drawn(0)
    abstract = (start, jax.eval_shape(tx.init, start))
    params, state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        abstract,
        layout.shardings(abstract, devices),
    )
    with jax.set_mesh(devices):
        directions, _ = jax.jit(tx.update).trace(params, state, params).out_info
    for (path, got), (_, given) in zip(named(directions), named(params), strict=True):
        assert got.sharding.spec == given.sharding.spec, path


def test_the_state_takes_the_memory_that_it_promises():
    params = jax.tree.map(jnp.asarray, drawn(0))
    embedded = {'embed_VD': jnp.zeros((128, 64))}
    matrices = {'blocks': {'mlp': {'up_DF': jnp.zeros((2, 64, 128))}}}

    def of(config, params):
        return n_bytes(jax.eval_shape(optimizer(config).init, params)) / n_bytes(params)

    assert of(AdamW(), matrices) == pytest.approx(2, abs=1e-3)
    assert of(Muon(), matrices) == pytest.approx(1, abs=1e-3)
    assert of(Muon(moments='bfloat16'), matrices) == pytest.approx(0.5, abs=1e-3)
    assert of(Muon(), embedded) == pytest.approx(2, abs=1e-3)
    assert of(Lion(), matrices) == pytest.approx(1, abs=1e-3)
    assert of(Lion(moments='bfloat16'), params) == pytest.approx(0.5, abs=1e-2)
    assert of(Adafactor(), matrices) == pytest.approx(1 / 64 + 1 / 128, abs=1e-3)
    assert of(Adafactor(momentum='bfloat16'), matrices) == pytest.approx(0.5234, abs=1e-3)


@pytest.mark.parametrize(
    'config, said',
    [
        (Muon(beta=1.0), r'--optimizer\.beta is 1\.0: it must be in \[0, 1\)'),
        (Muon(moments='bfloat16', beta2=0.999), r'beta2 0\.999: set it to 0\.99 or less'),
        (Muon(moments='bfloat16', beta=0.995), r'beta 0\.995: set it to 0\.99 or less'),
        (Lion(moments='bfloat16', beta2=0.999), r'beta2 0\.999: set it to 0\.99 or less'),
        (Adafactor(momentum='bfloat16', beta1=0.999), r'momentum bfloat16 cannot hold'),
        (Lion(beta1=-0.1), r'--optimizer\.beta1 is -0\.1'),
        (Lion(beta2=1.0), r'--optimizer\.beta2 is 1\.0'),
        (Adafactor(decay=0.0), r'--optimizer\.decay is 0\.0'),
        (Adafactor(clip_rms=0.0), r'--optimizer\.clip-rms is 0\.0'),
        (Adafactor(beta1=0.8), 'has no effect without a momentum'),
        (Adafactor(beta1=1.0, momentum='float32'), r'--optimizer\.beta1 is 1\.0'),
    ],
)
def test_nonsense_is_refused_by_name(config, said):
    with pytest.raises(UserError, match=said):
        optimizer(config)


@pytest.mark.parametrize('name', REGISTRY)
def test_what_may_change_leaves_the_state_as_it_is(name):
    other = dataclasses.replace(EVERY[name], clip=0.5, weight_decay=0.0, layer_decay=0.5)
    first, second = (optimizer(config).init(drawn(0)) for config in (EVERY[name], other))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_scalar_beside_the_model_moves():
    """Such as the bias of replaced-token detection."""
    params = {'objective': {'bias': jnp.zeros(())}}
    tx = optimizer(Adafactor())
    moved, _ = jax.jit(tx.update)({'objective': {'bias': jnp.ones(())}}, tx.init(params), params)
    assert float(moved['objective']['bias']) == pytest.approx(1.0)


def test_a_of_lora_reads_what_its_matrix_does():
    """Of a matrix with several letters that are read, such as those of heads."""
    params = {'a_NHR': jnp.ones((2, 4, 8, 3)), 'b_RD': jnp.ones((2, 3, 16))}
    state = jax.eval_shape(optimizer(Adafactor()).init, {'blocks': {'attention': params}})
    shapes = {
        jax.tree_util.keystr(path): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if 'a_NHR' in jax.tree_util.keystr(path)
    }
    assert {shape for path, shape in shapes.items() if 'rows' in path} == {(2, 4, 8, 1)}
    assert {shape for path, shape in shapes.items() if 'columns' in path} == {(2, 1, 1, 3)}

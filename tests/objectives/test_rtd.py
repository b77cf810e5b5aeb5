"""Replaced-token detection against its definition in float64."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax import layout, mesh
from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.rtd import ReplacedTokens, draw, replace

MESHES = {
    'one device': (1, MeshConfig()),
    'fsdp 8': (8, MeshConfig()),
    'data 2 fsdp 2 tensor 2': (8, MeshConfig(data=2, fsdp=2, tensor=2)),
}
CONFIG = ModelConfig(vocab=8, dim=32, layers=1, heads=4, kv_heads=4, head_dim=8, ffn=32, context=64)
COMPUTE = Compute(attention='reference', unroll=1)
OBJECTIVE = ReplacedTokens(generator=0.5, rate=0.4)
TOKENIZER = SimpleNamespace(mask_id=7, bos_id=6)


def make_mesh(name):
    n_devices, config = MESHES[name]
    return mesh.make(config, jax.devices()[:n_devices])


def place(arrays, devices):
    return jax.device_put(arrays, NamedSharding(devices, layout.rows()))


def make_batch(rows=8, length=12, padding=2):
    """Two texts a row, and padding."""
    random = np.random.default_rng(0)
    batch = {}
    for _ in range(rows):
        parts = []
        for n in (length // 2 - 1, length - length // 2 + 1 - padding):
            (example,) = pieces.examples(
                OBJECTIVE, random.integers(0, 6, n - 1), tokenizer=TOKENIZER, seq_len=n, rng=random
            )
            segment = {'segments': np.full(n, len(parts) + 1), 'positions': np.arange(n)}
            parts.append(example | segment)
        for key in parts[0]:
            x_T = np.concatenate([part[key] for part in parts])
            batch.setdefault(key, []).append(np.pad(x_T, (0, padding)))
    return {
        key: np.array(x, np.float32 if key == 'weights' else np.int32) for key, x in batch.items()
    }


@functools.cache
def parameters():
    """Backbone and extra, as numpy; large, so that the generator is both right and wrong."""
    with jax.set_mesh(make_mesh('one device')):
        params = layers.create(CONFIG, jax.random.key(0), make_mesh('one device'))
        extra = jax.jit(lambda: OBJECTIVE.extra(CONFIG, jax.random.key(1)))()
    params, extra = jax.device_get((params, extra))
    return params, jax.tree.map(lambda x: 2 * x, extra) | {'bias': np.float32(0.3)}


def total(params, extra, batch, key, *, objective=OBJECTIVE):
    loss = objective.loss(layers.bind(CONFIG, params), batch, extra=extra, compute=COMPUTE, key=key)
    return loss.total, loss


def placed(devices):
    return tuple(jax.device_put(tree, layout.shardings(tree, devices)) for tree in parameters())


@functools.cache
def sums_and_gradients(name, objective=OBJECTIVE):
    devices = make_mesh(name)
    with jax.set_mesh(devices):
        gradient = jax.jit(
            jax.grad(functools.partial(total, objective=objective), argnums=(0, 1), has_aux=True)
        )
        batch = place(make_batch(), devices)
        return jax.device_get(gradient(*placed(devices), batch, jax.random.key(3)))


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.mark.slow
def test_loss_equals_its_definition():
    batch = make_batch()
    params, extra = parameters()
    with jax.set_mesh(make_mesh('one device')):

        @jax.jit
        def forward(batch):
            sample_key, *_ = jax.random.split(jax.random.key(3), 3)
            context = {
                'position_BT': batch['positions'],
                'segment_BT': batch['segments'],
                'causal': False,
                'compute': COMPUTE,
            }
            generator = layers.bind(OBJECTIVE.generator_of(CONFIG), extra['generator'])
            x_BTD, _ = generator.features(batch['inputs'], **context)
            drawn_BT = draw(x_BTD, generator.head()[...], sample_key)
            input_BT = jax.numpy.where(batch['weights'] > 0, drawn_BT, batch['targets'])
            y_BTD, _ = layers.bind(CONFIG, params).features(input_BT, **context)
            return generator.logits(x_BTD), drawn_BT, y_BTD

        logit_BTV, drawn_BT, y_BTD = jax.device_get(forward(place(batch, make_mesh('one device'))))

    _, loss = sums_and_gradients('one device')
    mlm = bce = n_masked = n_tokens = n_replaced = right = 0
    for at in np.ndindex(*batch['inputs'].shape):
        if not batch['segments'][at]:
            continue
        n_tokens += 1
        target, label = batch['targets'][at], False
        if batch['weights'][at]:
            n_masked += 1
            logit_V = logit_BTV[at].astype(np.float64)
            mlm -= logit_V[target] - np.log(np.exp(logit_V).sum())
            label = drawn_BT[at] != target
        score = y_BTD[at].astype(np.float64) @ extra['head_D'] + extra['bias']
        bce -= log_sigmoid(score if label else -score)
        n_replaced += label
        right += (score > 0) == label
    assert 0 < n_replaced < n_masked < n_tokens < batch['inputs'].size
    assert loss.weight == n_tokens == OBJECTIVE.loss_tokens(batch)
    np.testing.assert_allclose(
        loss.total / loss.weight, mlm / n_masked + 50 * bce / n_tokens, rtol=1e-5
    )
    np.testing.assert_allclose(loss.metrics['generator_nll'] / n_tokens, mlm / n_masked, rtol=1e-5)
    np.testing.assert_allclose(loss.metrics['detection'], bce, rtol=1e-5)
    assert loss.metrics['replaced'] == n_replaced
    assert loss.metrics['accuracy'] == right


@pytest.mark.slow
@pytest.mark.parametrize('name', [*MESHES][1:])
def test_devices_change_neither_loss_nor_gradients(name):
    gradients, loss = sums_and_gradients(name)
    want_gradients, want = sums_and_gradients('one device')
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), loss, want)
    size = max(np.abs(x).max() for x in jax.tree.leaves(want_gradients))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * size), gradients, want_gradients
    )


@pytest.mark.slow
def test_the_discriminator_teaches_the_generator_nothing():
    (dparams, dextra), _ = sums_and_gradients('one device')
    alone = ReplacedTokens(generator=0.5, rate=0.4, weight=0.0)
    (dparams_alone, dextra_alone), _ = sums_and_gradients('one device', alone)
    jax.tree.map(np.testing.assert_array_equal, dextra['generator'], dextra_alone['generator'])
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(dextra))
    # Nor does the generator's loss teach the backbone.
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(dparams | {'head_VD': 1}))
    assert not any(np.any(x) for x in jax.tree.leaves(dparams_alone))


def test_label_says_that_the_token_is_another():
    target_BT = np.array([[5, 6, 7, 8]])
    masked_BT = np.array([[1.0, 0, 1, 0]])
    drawn_BT = np.array([[5, 9, 3, 8]])  # right, not asked, wrong, not asked
    input_BT, replaced_BT = replace(target_BT, masked_BT, drawn_BT=drawn_BT)
    np.testing.assert_array_equal(input_BT, [[5, 6, 3, 8]])
    np.testing.assert_array_equal(replaced_BT, [[False, False, True, False]])


def test_tokens_are_drawn_from_the_softmax_the_same_on_every_mesh():
    B, T, D, V = 8, 500, 8, 8  # more than one part of a row, and the last one is not whole
    random = np.random.default_rng(0)
    head_VD = random.normal(size=(V, D)).astype(np.float32)
    x_BTD = np.tile(random.normal(size=D).astype(np.float32), (B, T, 1))
    drawn = []
    for name in MESHES:
        devices = make_mesh(name)
        with jax.set_mesh(devices):
            head = jax.device_put(head_VD, NamedSharding(devices, layout.param('VD')))
            drawn.append(np.asarray(jax.jit(draw)(place(x_BTD, devices), head, jax.random.key(0))))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])
    p_V = np.exp(head_VD @ x_BTD[0, 0])
    expected_V = B * T * p_V / p_V.sum()
    count_V = np.bincount(drawn[0].ravel(), minlength=V)
    # 7 degrees of freedom: above 24.3 once in a thousand.
    assert np.sum((count_V - expected_V) ** 2 / expected_V) < 24.3
    # Every position has noise of its own.
    assert len({tuple(row) for row in drawn[0]}) == B
    assert len({tuple(part) for part in drawn[0][0].reshape(10, 50)}) == 10


def test_a_text_does_not_see_its_neighbour():
    """Change the second text of every row: the generator says the same of the first one."""
    batch = make_batch()
    batch['weights'] = np.where(batch['segments'] == 2, 0, batch['weights'])

    def changed(segment):
        here_BT = (batch['segments'] == segment) & (batch['weights'] == 0)
        return batch | {key: np.where(here_BT, 6, batch[key]) for key in ('inputs', 'targets')}

    devices = make_mesh('one device')
    with jax.set_mesh(devices):
        params, extra = placed(devices)
        metrics = jax.jit(lambda batch: total(params, extra, batch, jax.random.key(3))[1].metrics)
        before, after, own = (
            metrics(place(b, devices))['generator_nll'] for b in (batch, changed(2), changed(1))
        )
    assert before == after != own


@pytest.mark.parametrize('rate', [0.15, 0.4])
@pytest.mark.parametrize('n', [1, 2, 10, 100])
def test_example_masks_its_share_of_the_text(n, rate):
    text = np.arange(n) % 6
    (example,) = pieces.examples(
        ReplacedTokens(rate=rate),
        text,
        tokenizer=TOKENIZER,
        seq_len=101,
        rng=np.random.default_rng(0),
    )
    masked = example['weights'] == 1
    assert masked.sum() == max(1, round(rate * n)) and not masked[0]
    np.testing.assert_array_equal(example['targets'], [TOKENIZER.bos_id, *text])
    np.testing.assert_array_equal(
        example['inputs'], np.where(masked, TOKENIZER.mask_id, example['targets'])
    )
    assert [example[key].dtype for key in example] == [np.int32, np.int32, np.float32]


def test_long_documents_come_in_pieces():
    text = np.arange(250) % 6
    found = pieces.examples(
        OBJECTIVE, text, tokenizer=TOKENIZER, seq_len=100, rng=np.random.default_rng(0)
    )
    assert [len(example['inputs']) for example in found] == [100, 100, 53]
    originals = [example['targets'][1:] for example in found]
    np.testing.assert_array_equal(np.concatenate(originals), text)
    assert {example['targets'][0] for example in found} == {TOKENIZER.bos_id}


def test_generator_is_a_narrow_copy():
    llama = ModelConfig(
        vocab=99, dim=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, context=64
    )
    small = ReplacedTokens().generator_of(llama)
    assert (small.dim, small.heads, small.kv_heads, small.ffn) == (512, 8, 2, 2048)
    assert (small.layers, small.head_dim, small.vocab) == (16, 64, 99)
    for heads, kv_heads in ((5, 5), (6, 3), (12, 2), (1, 1)):
        config = ModelConfig(
            vocab=9, dim=60, layers=1, heads=heads, kv_heads=kv_heads, head_dim=8, ffn=8, context=8
        )
        ReplacedTokens(generator=0.4).check(config)  # heads share key-value heads evenly


def test_flops_count_both_models():
    objective = ReplacedTokens(generator=1.0)
    twice = 2 * (CONFIG.layers * (2 * 32 * 32 + 2 * 32 * 32 + 3 * 32 * 32 + 2 * 32 * 20))
    assert objective.flops(CONFIG, 20) == pytest.approx(6 * (twice + 8 * 32 * 3 / 20 + 32))


def test_settings_that_cannot_be_are_refused():
    for refused, match in (
        (lambda: ReplacedTokens(generator=0.0), 'generator'),
        (lambda: ReplacedTokens(rate=1.0), 'rate'),
        (lambda: OBJECTIVE.check(SimpleNamespace(encoder_layers=2)), 'encoder'),
        (lambda: OBJECTIVE.lengths(1), 'a row of 1 positions has no room'),
    ):
        with pytest.raises(UserError, match=match) as error:
            refused()
        assert '\n' not in str(error.value)
    assert OBJECTIVE.lengths(2) == {'': 2}  # a token behind the begin token is enough
    assert not OBJECTIVE.causal and not OBJECTIVE.accumulates

"""Features that the loss of an objective reads, for the tests of who sees whom."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import mesh
from llama_jax.data import pieces
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives import prediction
from llama_jax.objectives.softmax import CrossEntropy
from llama_jax.train.run import place
from tests.objectives import texts

DECODER = ModelConfig(
    vocab=700, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=32, context=64
)
BOTH = dataclasses.replace(DECODER, encoder_layers=2)
COMPUTE = Compute(attention='reference', unroll=1)


@functools.cache
def devices():
    return mesh.make(MeshConfig(), jax.devices()[:1])


@functools.cache
def parameters(config):
    return layers.create(config, jax.random.key(0), devices())


@functools.cache
def _compiled(objective, config, read):
    def run(params, batch):
        model = layers.bind(config, params)
        read_x = []

        def spy(x_BTD, head_VD, target_BT, weight_BT, z_loss, vocab_padding):
            read_x.append(x_BTD)
            return CrossEntropy(*(jnp.zeros(()),) * 3)

        context = {'extra': {}, 'compute': COMPUTE, 'key': None}
        if not read:
            return objective.loss(model, batch, **context)
        with mock.patch.object(prediction, 'cross_entropy', spy):
            objective.loss(model, batch, **context)
        return read_x[0]

    return jax.jit(run)


def features(objective, config, batch):
    """What the head is applied to [B, T, D] in the loss of `objective`."""
    with jax.set_mesh(devices()):
        run = _compiled(objective, config, True)
        return np.asarray(run(parameters(config), place(batch, devices())))


def loss(objective, config, batch):
    with jax.set_mesh(devices()):
        run = _compiled(objective, config, False)
        return jax.device_get(run(parameters(config), place(batch, devices())))


def make_batch(objective, *, seq_len, sizes, seed=0):
    """One row with an example of each of some pieces of text, padding behind them."""
    tokenizer = texts.tokenizer()
    tokens = tokenizer.encode(texts.CODE[1])
    examples = []
    start = 100
    for size in sizes:
        examples += pieces.examples(
            objective,
            tokens[start : start + size],
            tokenizer=tokenizer,
            seq_len=seq_len,
            rng=np.random.default_rng(seed),
        )
        start += size
    assert len(examples) == len(sizes)
    batch = texts.packed(examples, objective, seq_len=seq_len, rows=1, pad_id=tokenizer.pad_id)
    assert batch['segments'].max() == len(sizes) and batch['segments'].min() == 0
    return batch


def reach(objective, config, batch, *, stream=''):
    """[T, S], whether a change of input S of `stream` moves the features at T, at all."""
    name = f'{stream}/inputs' if stream else 'inputs'
    base = features(objective, config, batch)[0]
    columns = []
    for s in range(batch[name].shape[1]):
        changed = dict(batch)
        changed[name] = batch[name].copy()
        changed[name][0, s] = (changed[name][0, s] + 7) % config.vocab
        columns.append((features(objective, config, changed)[0] != base).any(-1))
    return np.stack(columns, axis=1)


def reach_of_all(objective, config, batch):
    """`reach` where all places bear loss; those that do in `batch` reach the same, the others
    nothing, for they are not computed."""
    found = reach(objective, config, dict(batch, weights=np.ones_like(batch['weights'])))
    bears_T = batch['weights'][0] != 0
    assert 0 < bears_T.sum() < len(bears_T) / 2
    np.testing.assert_array_equal(reach(objective, config, batch), found & bears_T[:, None])
    return found


def same(query_T, key_S):
    """[T, S], whether both are of one segment and no padding."""
    return (query_T[:, None] == key_S) & (query_T[:, None] > 0)

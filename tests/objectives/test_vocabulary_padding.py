"""A model with rows that no token has is the model without them: in training and in generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout, mesh
from llama_jax.errors import UserError
from llama_jax.generate.beam import beam_search
from llama_jax.generate.generator import Generator
from llama_jax.generate.programs import Programs
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.transformer import Transformer
from llama_jax.objectives import rtd
from llama_jax.objectives.softmax import cross_entropy

IDS, PADDING = 27, 5
PLAIN = ModelConfig(
    vocab=IDS, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=16, context=64
)
PADDED = dataclasses.replace(PLAIN, vocab=IDS + PADDING, vocab_padding=PADDING)


def params_of(config):
    return layers.split(Transformer(config, key=jax.random.key(0)))


def likely_padding():
    """Parameters whose padding would be by far the likeliest, were it a token."""
    params = params_of(PLAIN)
    sign_P1 = np.where(np.arange(PADDING) % 2, -9.0, 9.0)[:, None].astype(np.float32)
    more_PD = sign_P1 * np.ones((1, 16), np.float32)
    rows = {name: params[name] for name in ('embed_VD', 'head_VD')}
    return {**params, **{name: jnp.concatenate([x, more_PD]) for name, x in rows.items()}}


@pytest.mark.parametrize('tensor', [1, 4])
def test_the_loss_and_its_gradient_are_those_without_padding(tensor):
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(4, 6, 16)).astype(np.float32)
    head_VD = rng.normal(size=(IDS, 16)).astype(np.float32)
    target_BT = rng.integers(0, IDS, (4, 6)).astype(np.int32)
    weight_BT = np.ones((4, 6), np.float32)

    def gradient(head_VD, padding, devices):
        specs = layout.act('BTD'), layout.param('VD'), layout.act('BT'), layout.act('BT')
        with jax.set_mesh(devices):
            arrays = [
                jax.device_put(x, jax.sharding.NamedSharding(devices, spec))
                for x, spec in zip((x_BTD, head_VD, target_BT, weight_BT), specs, strict=True)
            ]

            def loss(x_BTD, head_VD):
                return cross_entropy(x_BTD, head_VD, *arrays[2:], 0.1, padding).total

            found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arrays[:2])
            return jax.tree.map(np.asarray, found)

    total, (dx, dhead) = gradient(head_VD, 0, mesh.make(MeshConfig(), jax.devices()[:1]))
    devices = mesh.make(MeshConfig(fsdp=1, tensor=tensor), jax.devices()[:tensor])
    more_VD = np.concatenate([head_VD, np.full((PADDING, 16), 3.0, np.float32)])
    total_2, (dx_2, dhead_2) = gradient(more_VD, PADDING, devices)
    np.testing.assert_allclose(total_2, total, rtol=1e-6)
    np.testing.assert_allclose(dx_2, dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dhead_2[:IDS], dhead, rtol=1e-5, atol=1e-5)
    assert not dhead_2[IDS:].any()


@pytest.mark.slow
def test_no_padding_is_drawn():
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    generate = Generator(
        PADDED, likely_padding(), mesh=devices, compute=Compute(), eos_ids=(1,), pad_id=0
    )
    greedy, drawn = generate([[2, 3], [4]], max_tokens=20, temperature=[0.0, 5.0], seed=[0, 1])
    assert max(greedy.tokens + drawn.tokens) < IDS
    with pytest.raises(UserError, match='holds token id 27, outside the vocabulary of 27'):
        generate([[IDS]], max_tokens=1)


def test_beams_hold_no_padding():
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    made = Programs(
        PADDED, likely_padding(), mesh=devices, compute=Compute(), end_ids=(1,), pad_id=0
    )
    (found,) = beam_search(made, [[2, 3]], beams=3, max_tokens=4, n=3)
    assert len(found) == 3 and max(max(one.tokens) for one in found) < IDS


def test_the_logits_of_a_sharded_head_are_masked():
    devices = mesh.make(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])
    params = likely_padding()
    params = jax.device_put(params, layout.shardings(params, devices))
    with jax.set_mesh(devices):
        token_BT = jnp.array([[2, 3, 4]])
        read = jax.jit(lambda p: layers.bind(PADDED, p)(token_BT, compute=Compute())[0])
        logits_BTV = np.asarray(read(params))
    assert np.isneginf(logits_BTV[..., IDS:]).all() and np.isfinite(logits_BTV[..., :IDS]).all()


def test_a_generator_of_replaced_tokens_draws_no_padding():
    x_BTD = np.ones((2, 100, 16), np.float32)
    head_VD = np.concatenate([np.zeros((IDS, 16)), np.ones((PADDING, 16))]).astype(np.float32)
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(devices):
        for padding, largest in ((PADDING, IDS - 1), (0, IDS + PADDING - 1)):
            drawn = rtd.draw(jnp.array(x_BTD), jnp.array(head_VD), jax.random.key(0), padding)
            assert int(drawn.max()) == largest


def test_a_vocabulary_that_is_left_open_makes_no_model():
    with pytest.raises(UserError, match='model.vocab 0 leaves it to a tokenizer'):
        params_of(dataclasses.replace(PLAIN, vocab=0))
    for values in ({'vocab': -1}, {'vocab_padding': -1}, {'vocab_padding': IDS}):
        with pytest.raises(UserError, match=f'model.{next(iter(values))} is'):
            dataclasses.replace(PLAIN, **values)

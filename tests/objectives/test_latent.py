"""The latent auxiliary by its definition, and that it is causal language modelling without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.base import EXTRA, Context
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.latent import LatentPrediction
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from tests.objectives import texts
from tests.objectives.pairs import make_mesh, place

BYTES = bytes_tokenizer()
CONFIG = ModelConfig(
    vocab=BYTES.vocab_size, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=24, context=32
)
COMPUTE = Compute(attention='reference', unroll=1)
OBJECTIVE = LatentPrediction(weight=0.3, momentum=0.8)


def make_batch():
    """Two texts in each row, and padding behind them."""
    made = []
    for n in (5, 8, 4, 9):
        tokens = np.random.default_rng(n).integers(0, 256, n)
        made += pieces.examples(
            OBJECTIVE, tokens, tokenizer=BYTES, seq_len=16, rng=np.random.default_rng(0)
        )
    return texts.packed(made, OBJECTIVE, seq_len=16, rows=2, pad_id=BYTES.pad_id)


@pytest.mark.slow
def test_loss_is_the_likelihood_and_the_distance_to_the_next_token_of_the_teacher():
    batch, devices = make_batch(), make_mesh('one device')
    with jax.set_mesh(devices):
        params, other = (layers.create(CONFIG, jax.random.key(i), devices) for i in range(2))
        extra = jax.jit(lambda: OBJECTIVE.extra(CONFIG, jax.random.key(2)))()

        def total(params, extra, teacher, batch, objective, context):
            loss = objective.loss(
                *(layers.bind(CONFIG, params), batch),
                extra=extra,
                compute=COMPUTE,
                key=None,
                context=context(teacher),
            )
            return loss.total, loss

        @jax.jit
        def run(params, extra, teacher, batch):
            carried = {'teacher': teacher}
            kinds = {
                'latent': (OBJECTIVE, lambda teacher: Context(jnp.int32(0), {'teacher': teacher})),
                'held out': (OBJECTIVE, lambda teacher: Context(None, {'teacher': teacher})),
                'weight 0': (LatentPrediction(weight=0.0), lambda _: Context(jnp.int32(0), {})),
                'causal': (CausalLM(), lambda _: Context()),
            }
            found = {
                name: jax.grad(total, argnums=(0, 1, 2), has_aux=True)(
                    params, extra, teacher, batch, *kind
                )
                for name, kind in kinds.items()
            }
            features = [
                OBJECTIVE.read(layers.bind(CONFIG, w), batch, compute=COMPUTE, key=None)
                for w in (params, teacher)
            ]
            moved = OBJECTIVE.carry(carried, {**params, EXTRA: extra}, {}, jnp.int32(0))
            return found, features, moved

        found, (x_BTD, y_BTD), moved = jax.device_get(
            run(params, extra, other, place(batch, devices))
        )
    (dparams, dextra, dteacher), loss = found['latent']
    _, causal = found['causal']
    assert loss.weight == (batch['weights'] > 0).sum() == 30
    up_DF, down_FD = (np.asarray(extra[name], np.float64) for name in ('up_DF', 'down_FD'))
    distance = 0.0
    for row, at in np.ndindex(2, 15):
        if (
            batch['segments'][row, at]
            and batch['segments'][row, at] == batch['segments'][row, at + 1]
        ):
            hidden_F = np.asarray(jax.nn.gelu(x_BTD[row, at] @ up_DF))
            predicted_D, target_D = hidden_F @ down_FD, y_BTD[row, at + 1].astype(np.float64)
            predicted_D, target_D = (v / np.linalg.norm(v) for v in (predicted_D, target_D))
            distance += np.sum((predicted_D - target_D) ** 2)
    np.testing.assert_allclose(loss.metrics['latent'], distance, rtol=1e-5)
    np.testing.assert_allclose(loss.total, causal.total + 0.3 * distance, rtol=1e-6)
    assert not any(np.any(x) for x in jax.tree.leaves(dteacher))
    assert all(np.any(x) for x in jax.tree.leaves(dextra))
    for name in ('held out', 'weight 0'):
        (own, _, _), other_loss = found[name]
        jax.tree.map(np.testing.assert_array_equal, own, found['causal'][0][0])
        assert other_loss.total == causal.total and other_loss.metrics == causal.metrics
    assert any(
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (dparams, found['causal'][0][0])), strict=True)
    )
    jax.tree.map(
        lambda new, old, now: np.testing.assert_allclose(new, 0.8 * old + 0.2 * now, atol=1e-6),
        moved['teacher'],
        *map(jax.device_get, (other, params)),
    )


def test_without_weight_nothing_is_beside_the_model():
    plain = LatentPrediction(weight=0.0)
    assert plain.extra(CONFIG, jax.random.key(0)) == {}
    assert plain.carried(CONFIG, {}, jax.random.key(0)) == {}
    assert plain.flops(CONFIG, 32) == CausalLM().flops(CONFIG, 32) < OBJECTIVE.flops(CONFIG, 32)
    for settings in ({'weight': -1.0}, {'momentum': 1.0}):
        with pytest.raises(UserError, match='must be'):
            LatentPrediction(**settings)
    with pytest.raises(UserError, match='momentum 0.9 has no effect with --objective.weight 0'):
        LatentPrediction(weight=0.0, momentum=0.9)

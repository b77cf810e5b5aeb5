"""Causal language modelling: its examples, its loss, and 20 steps of training kept in a file."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llama_jax import mesh
from llama_jax.data import pieces
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.base import optimizer
from llama_jax.optim.schedule import ScheduleConfig, schedule
from llama_jax.train.run import place
from llama_jax.train.step import initial_state, train_step

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests/goldens/losses_causal.json'
CONFIG = ModelConfig(
    vocab=258, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, context=64
)
TOKENIZER = SimpleNamespace(bos_id=256, eos_id=257)


def test_example_predicts_every_token_and_the_end():
    (example,) = pieces.examples(
        CausalLM(),
        np.array([5, 6, 7]),
        tokenizer=TOKENIZER,
        seq_len=4,
        rng=np.random.default_rng(0),
    )
    np.testing.assert_array_equal(example['inputs'], [256, 5, 6, 7])
    np.testing.assert_array_equal(example['targets'], [5, 6, 7, 257])
    np.testing.assert_array_equal(example['weights'], [1, 1, 1, 1])
    assert [example[name].dtype for name in ('inputs', 'targets', 'weights')] == [
        *(np.int32, np.int32, np.float32)
    ]


def test_a_piece_begins_with_the_token_before_it():
    tokens = np.arange(1, 11)
    piece = pieces.Piece(tokens, 4, 7, draw=0.5, sizes=(3,), identity=0)
    example = CausalLM().example(
        piece, tokenizer=TOKENIZER, seq_len=3, rng=np.random.default_rng(0)
    )
    np.testing.assert_array_equal(example['inputs'], [4, 5, 6])
    np.testing.assert_array_equal(example['targets'], [5, 6, 7])


def real_batches(n, *, rows, seq_len):
    """The licence text, a byte a token, cut into rows."""
    text = np.frombuffer((ROOT / 'LICENSE').read_bytes(), np.uint8)
    (example,) = pieces.examples(
        CausalLM(),
        text,
        tokenizer=TOKENIZER,
        seq_len=len(text) + 1,
        rng=np.random.default_rng(0),
    )
    size = rows * seq_len
    for i in range(n):
        start = i * size % (len(text) - size)
        cut = {name: x[start : start + size].reshape(rows, -1) for name, x in example.items()}
        position_BT = np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1))
        yield {**cut, 'positions': position_BT, 'segments': np.ones_like(position_BT)}


@pytest.mark.slow
def test_loss_is_that_of_the_logits():
    objective = CausalLM(z_loss=0.1)
    (batch,) = real_batches(1, rows=2, seq_len=16)
    batch['weights'][0, :7] = 0
    batch['segments'][1, 9:] = 2
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    params = layers.create(CONFIG, jax.random.key(0), devices)
    with jax.set_mesh(devices):

        @jax.jit
        def both(params, batch):
            model = layers.bind(CONFIG, params)
            logits_BTV, _ = model(
                batch['inputs'],
                position_BT=batch['positions'],
                segment_BT=batch['segments'],
                compute=Compute(),
            )
            return objective.loss(model, batch, extra={}, compute=Compute(), key=None), logits_BTV

        loss, logits_BTV = jax.device_get(both(params, place(batch, devices)))
    logits_BTV = logits_BTV.astype(np.float64)
    log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
    target_BT1 = batch['targets'][..., None]
    nll_BT = log_z_BT - np.take_along_axis(logits_BTV, target_BT1, -1)[..., 0]
    weight_BT = batch['weights']
    correct_BT = logits_BTV.argmax(-1) == batch['targets']
    assert loss.weight == objective.loss_tokens(batch) == 2 * 16 - 7
    np.testing.assert_allclose(
        loss.total, (weight_BT * (nll_BT + 0.1 * log_z_BT**2)).sum(), rtol=1e-6
    )
    np.testing.assert_allclose(loss.metrics['nll'], (weight_BT * nll_BT).sum(), rtol=1e-6)
    assert loss.metrics['accuracy'] == (weight_BT * correct_BT).sum()


@pytest.mark.slow
def test_twenty_steps_give_the_losses_of_the_golden_file():
    """Written by `LLAMA_JAX_WRITE_GOLDENS=1 python -m pytest tests/objectives`.

    Sums in another order (another jax, processor or thread count) move a loss by 1e-6 or so;
    a change of initial values, data, model, loss, optimizer or schedule moves it by far more.
    """
    steps = 20
    config = AdamW(schedule=ScheduleConfig(peak=1e-2, warmup_steps=4))
    tx, objective = optimizer(config), CausalLM()
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    state = initial_state(CONFIG, CausalLM(), tx, seed=0, mesh=devices)
    step = train_step(
        CONFIG,
        objective,
        tx,
        learning_rate=schedule(config.schedule, steps),
        accumulate=1,
        compute=Compute(),
    )
    losses = []
    with jax.set_mesh(devices):
        for batch in real_batches(steps, rows=4, seq_len=64):
            state, metrics = step(state, place(batch, devices))
            losses.append(float(metrics['loss']))
    if os.environ.get('LLAMA_JAX_WRITE_GOLDENS'):
        written = {
            'jax': jax.__version__,
            'model': dataclasses.asdict(CONFIG),
            'losses': losses,
        }
        GOLDEN.write_text(json.dumps(written, indent=1) + '\n')
    golden = json.loads(GOLDEN.read_text())
    assert golden['model'] == dataclasses.asdict(CONFIG)
    np.testing.assert_allclose(losses, golden['losses'], rtol=1e-4)
    assert losses[-1] < losses[0] - 1.5  # it learns
    assert pytest.approx(np.log(258), abs=0.5) == losses[0]

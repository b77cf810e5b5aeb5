"""What holds when chats are learnt in the loop: microbatches and packing change no loss."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from llama_jax.data.config import DataConfig, Source
from llama_jax.data.record import Chat
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.base import optimizer
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.chat import FORMATS
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train import run
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
    check,
)
from llama_jax.train.loop import train
from llama_jax.train.place import place
from llama_jax.train.records import read_metrics
from llama_jax.train.step import initial_state, train_step
from tests.objectives.records import batch_of
from tests.train.conftest import one_device
from tests.train.every import DECODER

MODEL = dataclasses.replace(DECODER, dropout=0.0)
OBJECTIVE = InstructionTuning()
SEQ_LEN, STEPS = 64, 20


def texts(n, seed=0):
    chance = np.random.default_rng(seed)
    return [''.join(map(chr, chance.integers(97, 123, chance.integers(2, 14)))) for _ in range(n)]


def chats(n, seed=0):
    said = iter(texts(2 * n, seed))
    for user, answer in zip(said, said, strict=True):
        messages = [{'role': 'user', 'content': user}, {'role': 'assistant', 'content': answer}]
        yield Chat(tuple(messages), (0.0, 1.0))


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(run.meshes, 'make', one_device)
    lines = [json.dumps({'messages': chat.messages}) for chat in chats(200)]
    (tmp_path / 'chats.jsonl').write_text('\n'.join(lines))
    bytes_tokenizer().save(tmp_path / 'bytes.model')
    return Experiment(
        name='chats',
        model=MODEL,
        data=DataConfig(
            sources=(Source('records', files=(str(tmp_path / 'chats.jsonl'),)),),
            tokenizer=TokenizerConfig(path=str(tmp_path / 'bytes.model')),
            chat='llama2',
        ),
        objective=OBJECTIVE,
        train=TrainConfig(steps=STEPS, batch=8, seq_len=SEQ_LEN, log_every=1),
        optimizer=AdamW(schedule=ScheduleConfig(peak=1e-3, warmup_steps=4)),
        evaluation=EvaluationConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
        compute=Compute(precision='float32'),
    )


def told(workdir):
    lines = [line for line in read_metrics(workdir) if line['kind'] == 'train']
    return np.array([line['loss'] for line in lines]), [line['weight'] for line in lines]


def equal(a, b):
    """Step by step, and without a drift to one side."""
    residual = (a - b) / b
    assert np.abs(residual).max() < 1e-6 and abs(residual.mean()) < 1e-7


@pytest.mark.slow
def test_eight_rows_are_eight_microbatches_of_one(experiment, tmp_path):
    at_once = experiment
    apart = dataclasses.replace(
        experiment, train=dataclasses.replace(experiment.train, accumulate=8)
    )
    for config, name in ((at_once, 'one'), (apart, 'eight')):
        train(config, tmp_path / name)
    (losses, weights), (eight, its) = (told(tmp_path / name) for name in ('one', 'eight'))
    assert weights == its and len(set(weights)) > 1  # microbatches weigh what they weigh
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1
    equal(eight, losses)


@pytest.mark.slow
def test_packed_chats_are_learnt_as_each_in_a_row_of_its_own():
    """20 updates by AdamW on the same chats in two layouts."""
    tokenizer, devices = bytes_tokenizer(), one_device(MeshConfig())
    adamw = optimizer(AdamW())
    rows = [list(chats(3, seed)) for seed in range(STEPS * 2)]
    losses = []
    for packed in (True, False):
        step = train_step(
            *(MODEL, OBJECTIVE, adamw),
            learning_rate=lambda step: 1e-3,
            accumulate=1,
            compute=Compute(precision='float32'),
        )
        state = initial_state(MODEL, OBJECTIVE, adamw, seed=0, mesh=devices)
        losses.append([])
        for i in range(0, len(rows), 2):
            batch = rows[i : i + 2]
            if not packed:
                batch = [[one] for row in batch for one in row]
            arrays = batch_of(OBJECTIVE, batch, tokenizer, chat=FORMATS['llama2'], seq_len=128)
            with jax.set_mesh(devices):
                state, metrics = step(state, place(arrays, devices))
            losses[-1].append(float(metrics['loss']))
    together, apart = map(np.array, losses)
    assert together[-1] < together[0] - 1
    equal(together, apart)


def test_a_chat_format_without_chats_is_refused(experiment):
    devices = one_device(MeshConfig())
    check(experiment, devices)
    pairs = dataclasses.replace(experiment, objective=SequenceToSequence())
    with pytest.raises(UserError, match='--data.chat has no effect where SequenceToSequence'):
        check(pairs, devices)
    check(dataclasses.replace(pairs, objective=SequenceToSequence(chat=True)), devices)

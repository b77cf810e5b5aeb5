"""Pairs of answers from real text, for the tests of runs that learn from them."""

import json
import os
from pathlib import Path

import numpy as np

from llama_jax.data.config import DataConfig, Source
from llama_jax.model.config import ModelConfig
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
)
from llama_jax.train.records import read_metrics
from tests.train.every import VOCAB

ROOT = Path(__file__).parents[2]
LICENCE = ROOT / 'LICENSE'
GOLDEN = ROOT / 'tests/goldens/losses_preferences.json'


def written(path, *, n=40, seed=0):
    """Beginnings of lines of the licence; the better answer is how the line goes on, the worse one
    the same words in another order."""
    random = np.random.default_rng(seed)
    lines = [line.split() for line in LICENCE.read_text().splitlines()]
    lines = [words for words in lines if len(words) > 5 and len(set(words[2:])) > 2][:n]
    records = []
    for words in lines:
        worse = words[2:]
        while worse == words[2:]:
            random.shuffle(worse)
        records.append(
            {
                'prompt': ' '.join(words[:2]),
                'chosen': ' ' + ' '.join(words[2:])[:24],
                'rejected': ' ' + ' '.join(worse)[:23],
            }
        )
    path.write_text('\n'.join(map(json.dumps, records)), 'utf-8')
    return path


def data(directory):
    """Of bytes: the same on every machine and version."""
    bytes_tokenizer().save(directory / 'bytes.model')
    train, held_out = (
        written(directory / f'{name}.jsonl', seed=seed)
        for seed, name in enumerate(('train', 'held_out'))
    )
    return DataConfig(
        sources=(Source('records', files=(str(train),)),),
        validation=(Source('records', files=(str(held_out),), label='held_out'),),
        tokenizer=TokenizerConfig(path=str(directory / 'bytes.model')),
    )


def read(path):
    """The records of a file."""
    return [json.loads(line) for line in Path(path).read_text('utf-8').splitlines()]


def experiment(objective, directory):
    """20 steps, a checkpoint every 10, a validation of held-out pairs after the last."""
    return Experiment(
        name='pairs',
        model=ModelConfig(
            vocab=VOCAB, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, context=64
        ),
        data=data(directory),
        objective=objective,
        train=TrainConfig(steps=20, batch=8, seq_len=128, log_every=1),
        optimizer=AdamW(schedule=ScheduleConfig(peak=3e-3, warmup_steps=0)),
        evaluation=EvaluationConfig(every=20),
        checkpoint=CheckpointConfig(every=10, keep=3),
    )


def lines(workdir, kind):
    """Of the metrics of a run, but for what tells of time."""
    timed = ('seconds', 'tokens_per_second', 'mfu', 'seconds_waiting')
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in read_metrics(workdir)
        if line['kind'] == kind
    ]


def assert_golden(name, workdir):
    """The losses of a run are those of the golden file, which is written by
    `LLAMA_JAX_WRITE_GOLDENS=1 python -m pytest tests/train`."""
    losses = [line['loss'] for line in lines(workdir, 'train')]
    goldens = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get('LLAMA_JAX_WRITE_GOLDENS'):
        goldens[name] = losses
        GOLDEN.write_text(json.dumps(dict(sorted(goldens.items())), indent=1) + '\n')
    np.testing.assert_allclose(losses, goldens[name], rtol=2e-4)

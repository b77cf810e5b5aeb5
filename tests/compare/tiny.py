"""The tiny grid of these tests, for the tests and for the processes they start."""

import inspect
import json
import textwrap
from dataclasses import replace

from llama_jax.compare.grid import Arm, Grid
from llama_jax.data.config import DataConfig, Source
from llama_jax.evaluate.suite import Suite
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
)

VOCAB = 512


def write_text(path, module=textwrap):
    """Functions of a module, one a document."""
    documents = [x for x in inspect.getsource(module).split('\n\n\n') if x.strip()]
    path.write_text('\n'.join(json.dumps({'text': x}) for x in documents), 'utf-8')
    return path


def experiment(text, **changes):
    return replace(
        Experiment(
            name='tiny',
            model=ModelConfig(
                vocab=VOCAB, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, context=64
            ),
            data=DataConfig(
                sources=(Source('text_files', files=(str(text),)),),
                train_split='train',
                validation_split='train[:4]',
                tokenizer=TokenizerConfig(vocab=VOCAB),
            ),
            train=TrainConfig(steps=20, batch=8, seq_len=32, log_every=1),
            optimizer=AdamW(schedule=ScheduleConfig(peak=1e-2, warmup_steps=4)),
            evaluation=EvaluationConfig(every=10, batches=1),
            checkpoint=CheckpointConfig(every=5),
        ),
        **changes,
    )


def grid(text, **changes):
    return replace(
        Grid(
            name='tiny',
            title='Two weights of the z-loss',
            arms=(
                Arm('plain', experiment(text, name='plain', objective=CausalLM(z_loss=0.0))),
                Arm('z', experiment(text, name='z', objective=CausalLM(z_loss=1e-2))),
            ),
            seeds=2,
            suite=Suite(span=16, window=32),
            again=False,
            baselines=False,
        ),
        **changes,
    )


def changed(experiment, section, **values):
    """The experiment with other settings in one section."""
    return replace(experiment, **{section: replace(getattr(experiment, section), **values)})


def with_second_arm(grid, change, **changes):
    """The grid with its second arm's experiment changed."""
    first, second = grid.arms
    arms = (first, replace(second, experiment=change(second.experiment)))
    return replace(grid, arms=arms, **changes)

"""The main job on an embedded default: a small LLaMA on the source of Python's standard library.

Launch: make quickstart, that is
    python -m experiments.pretrain quickstart --workdir runs/quickstart
"""

from __future__ import annotations

from llama_jax.data.config import DataConfig, Source
from llama_jax.model.config import ModelConfig
from llama_jax.optim.muon import Muon
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
)


def quickstart() -> Experiment:
    """A decoder of 3 million parameters, trained for minutes on a laptop."""
    return Experiment(
        name='quickstart',
        model=ModelConfig(
            vocab=0,  # as many as the tokenizer has
            dim=192,
            layers=6,
            heads=4,
            kv_heads=2,
            head_dim=48,
            ffn=512,
            context=512,
            tied=True,
        ),
        data=DataConfig(
            sources=(Source('python_corpus/stdlib_code'),), tokenizer=TokenizerConfig(vocab=2048)
        ),
        train=TrainConfig(steps=480, batch=8, seq_len=256),
        optimizer=Muon(schedule=ScheduleConfig(peak=1e-2, warmup_steps=20)),
        evaluation=EvaluationConfig(every=240, prompts=('def ', 'class ', 'import os\n')),
        checkpoint=CheckpointConfig(every=80),
    )

"""Recipes of fine-tuning: every public function here returns an Experiment without data, whose
model is what --from names.

    python -m experiments.finetune instruct_lora --from smollm2 --data.files my.jsonl

A recipe differs from another by what its function says, and by nothing else. Rates are those of the
papers named, where models have billions of parameters; smaller models take larger ones. Batches are
ours: 8 rows of 1,024 tokens, into which records are packed. docs/finetuning.md tells which to take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llama_jax.data.config import DataConfig
from llama_jax.model.config import ModelConfig
from llama_jax.objectives import AnyObjective
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.classify import Classification
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.optim.adamw import OptimizerConfig
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
)

ANY = ModelConfig(
    vocab=0, dim=64, layers=2, heads=1, kv_heads=1, head_dim=64, ffn=192, context=1024, tied=True
)
"""Stands where the model of --from will be."""


def _full(
    name: str, objective: AnyObjective, *, peak: float, epochs: float, examples: int = 6
) -> Experiment:
    """Every parameter is trained."""
    return Experiment(
        name=name,
        model=ANY,
        data=DataConfig(sources=()),
        train=TrainConfig(steps=0, epochs=epochs, batch=8, seq_len=1024, log_every=1),
        objective=objective,
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak=peak, warmup_steps=0, warmup_share=0.03)
        ),
        evaluation=EvaluationConfig(every=100, examples=examples, sample_tokens=64),
        checkpoint=CheckpointConfig(every=100, keep=1),
    )


def text() -> Experiment:
    """Pre-training goes on, on documents of one's own.

    Rate: ours, a third of the peak of Llama 2 7B, for re-warming (Ibrahim et al. 2024).
    """
    return _full('text', CausalLM(), peak=1e-4, epochs=1, examples=0)


def instruct() -> Experiment:
    """Chats: the assistant's turns are learnt, in the model's own template.

    Rate, epochs, decay: Llama 2 (Touvron et al. 2023b, section 3.1), which takes 64 rows of 4,096.
    """
    return _full('instruct', InstructionTuning(), peak=2e-5, epochs=2)


def seq2seq() -> Experiment:
    """Pairs of texts (`prompt` and `completion`, `source` and `target`) by a decoder, in plain
    text; `--objective.chat True` puts them into the model's chat format.

    Rate: that of instruction tuning.
    """
    return _full('seq2seq', SequenceToSequence(between='\n'), peak=2e-5, epochs=3)


def encoder_decoder() -> Experiment:
    """The same pairs by an encoder-decoder: --from a run of pre-training that has one.

    Rate: BART's (Lewis et al. 2020, fine-tuning: 3e-5).
    """
    return _full('encoder_decoder', SequenceToSequence(encoder=True), peak=3e-5, epochs=3)


def classify() -> Experiment:
    """Texts with labels: a head on the last token, and every parameter of the model.

    Rate, epochs, decay: BERT's (Devlin et al. 2019, appendix A.3: 2e-5 to 5e-5, 3 epochs).
    """
    recipe = _full('classify', Classification(dropout=0.1), peak=2e-5, epochs=3)
    return _with_optimizer(recipe, weight_decay=0.01)


def _with_optimizer(recipe: Experiment, **values: Any) -> Experiment:
    return replace(recipe, optimizer=replace(recipe.optimizer, **values))

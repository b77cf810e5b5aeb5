"""Objectives of pre-training and of fine-tuning: one file each."""

from __future__ import annotations

from llama_jax.objectives.classify import Classification
from llama_jax.objectives.distill import Distillation
from llama_jax.objectives.grpo import GRPO
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.objectives.preference import DPO
from llama_jax.objectives.reward import RewardModel
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.objectives.weighted import Part, Weighted

AnyObjective = (
    Part
    | Weighted
    | InstructionTuning
    | SequenceToSequence
    | Classification
    | DPO
    | RewardModel
    | Distillation
    | GRPO
)
"""Every objective of the house: what a configuration may hold and the command line can set."""

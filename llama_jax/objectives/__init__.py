"""Objectives of pre-training and of fine-tuning: one file each, and one line here."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from llama_jax.data.record import Text
from llama_jax.objectives.bart import Bart
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.classify import Classification
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.dense_retrieval import DenseRetrieval
from llama_jax.objectives.deshuffle import Deshuffling
from llama_jax.objectives.diffusion import MaskedDiffusion
from llama_jax.objectives.distill import Distillation
from llama_jax.objectives.dual import Dual
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.grpo import GRPO
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.objectives.latent import LatentPrediction
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.masked_inputs import MaskedInputs
from llama_jax.objectives.moco import MomentumContrast
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.objectives.preference import DPO
from llama_jax.objectives.prefix import PrefixLM
from llama_jax.objectives.retromae import RetroMAE
from llama_jax.objectives.reward import RewardModel
from llama_jax.objectives.rtd import ReplacedTokens
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.switch import Switch
from llama_jax.objectives.token_order import TokenOrder
from llama_jax.objectives.ul2 import UL2
from llama_jax.objectives.weighted import Weighted

REGISTRY: dict[str, type[Any]] = {
    'causal': CausalLM,
    'prefix': PrefixLM,
    'masked': MaskedLM,
    'spans': SpanCorruption,
    'deshuffle': Deshuffling,
    'ul2': UL2,
    'bart': Bart,
    'fim': FillInMiddle,
    'diffusion': MaskedDiffusion,
    'block-diffusion': BlockDiffusion,
    'dual': Dual,
    'contrastive': InfoNCE,
    'rtd': ReplacedTokens,
    'moco': MomentumContrast,
    'retromae': RetroMAE,
    'latent': LatentPrediction,
    'multi-token': MultiToken,
    'token-order': TokenOrder,
    'masked-inputs': MaskedInputs,
    'weighted': Weighted,
    'switch': Switch,
    'instruct': InstructionTuning,
    'seq2seq': SequenceToSequence,
    'classify': Classification,
    'retrieval': DenseRetrieval,
    'dpo': DPO,
    'reward': RewardModel,
    'distill': Distillation,
    'grpo': GRPO,
}
"""Name -> class, an `Objective`: what --objective can name, and what a record can hold. Words of a
name are joined by '-', as in options; --objective takes '_' too."""


def of_text() -> dict[str, Any]:
    """Those that learn from text alone, by name, with the defaults of their classes; without those
    that have no defaults."""
    plain = {
        name: kind()
        for name, kind in REGISTRY.items()
        if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(kind))
    }
    return {
        name: one
        for name, one in plain.items()
        if one.reads is Text and one.rollout is None and not one.joins
    }

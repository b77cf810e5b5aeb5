"""Every objective of the house on a tiny model, for the tests that hold for all of them."""

from dataclasses import replace

from llama_jax.model.config import ModelConfig
from llama_jax.objectives.bart import Bart
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.classify import Classification
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.prefix import PrefixLM
from llama_jax.objectives.rtd import ReplacedTokens
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.ul2 import UL2
from llama_jax.objectives.weighted import Weighted

VOCAB = 399  # of data.tokenizer.bytes_tokenizer
DECODER = ModelConfig(
    vocab=VOCAB,
    dim=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=64,
    context=64,
    dropout=0.1,
)
BOTH = replace(DECODER, encoder_layers=1)

EVERY = {
    'causal': (CausalLM(), DECODER),
    'prefix': (PrefixLM(), DECODER),
    'spans': (SpanCorruption(), DECODER),
    'spans encoder': (SpanCorruption(encoder=True), BOTH),
    'ul2': (UL2(), DECODER),
    'bart': (Bart(), BOTH),
    'masked': (MaskedLM(), DECODER),
    'mntp': (MaskedLM(read_previous=True), DECODER),
    'fim': (FillInMiddle(), DECODER),
    'contrastive': (InfoNCE(), DECODER),
    'contrastive dropout': (InfoNCE(views='dropout', learned=True, chunks=1), DECODER),
    'rtd': (ReplacedTokens(), DECODER),
    'causal + contrastive': (
        Weighted(
            parts=(CausalLM(), InfoNCE(bidirectional=False)),
            weights=(1.0, 0.1),
            shares=(0.625, 0.375),
        ),
        DECODER,
    ),
    'instruct': (InstructionTuning(), DECODER),
    'seq2seq': (SequenceToSequence(encoder=True), BOTH),
    'classify': (
        Classification(labels=('even', 'odd'), pool='mean', bidirectional=True, dropout=0.1),
        DECODER,
    ),
}

"""Every objective that is registered on a tiny model, for the tests that hold for all of them."""

from dataclasses import replace

from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives import REGISTRY
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.classify import Classification
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.moco import MomentumContrast
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.switch import Switch
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

ELSEWHERE = {'dpo', 'reward', 'distill', 'grpo'}
"""Those that need more than records have tests of their own, of all that is tested here."""

SETTINGS = {
    'weighted': Weighted(parts=(CausalLM(), InfoNCE(views='shared')), weights=(1.0, 0.1)),
    'switch': Switch(parts=(MaskedLM(), CausalLM()), begins=(0, 8)),
    'seq2seq': SequenceToSequence(encoder=True),
    'classify': Classification(
        labels=('even', 'odd'), pool='mean', bidirectional=True, dropout=0.1
    ),
    'moco': MomentumContrast(queue=64, momentum=0.9),
    'multi-token': MultiToken(heads=3, curriculum='reverse', curriculum_steps=20),
    # Further forms of some.
    'spans encoder': SpanCorruption(encoder=True),
    'mntp': MaskedLM(read_previous=True),
    'contrastive dropout': InfoNCE(views='dropout', learned=True, chunks=1),
}
"""Where the defaults of a class are not what is tested, or not all of it."""


def _on_a_model(objective):
    """The objective, and the model on which it can be trained."""
    try:
        objective.check(DECODER)
    except UserError:
        objective.check(BOTH)
        return objective, BOTH
    # Without dropout the last layer is computed where there is loss alone.
    sure = objective in (SpanCorruption(), MaskedLM(read_previous=True))
    return objective, replace(DECODER, dropout=0.0) if sure else DECODER


_NAMES = dict.fromkeys([*REGISTRY, *SETTINGS])
EVERY = {
    name: _on_a_model(SETTINGS.get(name) or REGISTRY[name]())
    for name in _NAMES
    if name not in ELSEWHERE
}

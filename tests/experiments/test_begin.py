"""What stands before a text that a run of this project reads."""

import pytest

from experiments import models
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.dense_retrieval import DenseRetrieval
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.moco import MomentumContrast
from llama_jax.text.sentencepiece_model import bytes_tokenizer


@pytest.mark.parametrize(
    ('objective', 'begins'),
    [
        (InfoNCE(), False),  # whose views are texts of their own
        (MomentumContrast(), False),
        (InfoNCE(views='shared'), True),
        (DenseRetrieval(), True),
        (MaskedLM(), True),
        (CausalLM(), True),
    ],
)
def test_a_text_is_begun_as_the_objective_read_it(objective, begins):
    tokenizer = bytes_tokenizer()
    assert models.begin_of(objective, tokenizer) == (tokenizer.bos_id,) * begins

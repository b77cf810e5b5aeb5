"""Which runs are asked to infill: those whose objective has shown them the marks."""

import pytest

from experiments import models
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.weighted import Weighted
from llama_jax.text import infill
from llama_jax.text.sentencepiece_model import bytes_tokenizer

TOKENIZER = bytes_tokenizer()


def both(*parts):
    return Weighted(parts, weights=(1.0, 1.0), shares=(0.5, 0.5))


@pytest.mark.parametrize(
    ('objective', 'suffix_first'),
    [
        (CausalLM(), None),
        (FillInMiddle(rate=0.0), None),
        (FillInMiddle(), False),
        (FillInMiddle(spm=0.9), False),
        (FillInMiddle(spm=1.0), True),
        (both(CausalLM(), FillInMiddle(spm=1.0)), True),
        (both(CausalLM(), FillInMiddle(rate=0.0)), None),
    ],
)
def test_objectives(objective, suffix_first):
    found = models.trained_to_infill(objective, TOKENIZER)
    if suffix_first is None:
        assert found is None
    else:
        assert found == infill.own(TOKENIZER, suffix_first=suffix_first)

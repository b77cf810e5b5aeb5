"""Whether texts that an objective is trained on begin with bos, and so those that it is asked."""

import numpy as np
import pytest

from llama_jax.data.pieces import Piece
from llama_jax.objectives import of_text
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.deshuffle import Deshuffling
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.switch import Switch
from llama_jax.objectives.weighted import Weighted
from llama_jax.text.sentencepiece_model import bytes_tokenizer

TOKENIZER, N, SEQ_LEN = bytes_tokenizer(), 20, 64


CASES = of_text() | {
    'encdec spans': SpanCorruption(encoder=True),
    'encdec deshuffle': Deshuffling(encoder=True),
}


@pytest.mark.parametrize('name', CASES)
def test_reading_says_whether_examples_begin_with_bos(name):
    objective, rng = CASES[name], np.random.default_rng(0)
    draw = 0.99  # the denoiser of UL2 that continues a text
    sizes = objective.sizes(N, seq_len=SEQ_LEN, draw=draw)
    piece = Piece(np.arange(20, 20 + N), 0, N, draw, sizes, 0)
    example = objective.example(piece, tokenizer=TOKENIZER, seq_len=SEQ_LEN, rng=rng)
    inputs = [x for stream, x in example.items() if stream.rpartition('/')[2] == 'inputs']
    # A mode may stand before it.
    assert any(TOKENIZER.bos_id in x[:2] for x in inputs) == objective.reading.begins


def test_of_several_parts():
    apart, shared = InfoNCE(), InfoNCE(views='shared', bidirectional=False)
    assert not apart.reading.begins and shared.reading.begins
    # A schedule leaves a model of its last part; a sum reads texts of both kinds.
    assert not Switch((CausalLM(), apart), begins=(0, 10)).reading.begins
    assert Switch((apart, CausalLM()), begins=(0, 10)).reading.begins
    assert not Weighted((SpanCorruption(), shared), (1.0, 0.1), (1.0, 0.0)).reading.begins
    assert Weighted((CausalLM(), apart), (1.0, 0.1), (0.5, 0.5)).reading.begins

"""Live comparison of beam search with transformers' `generate`, token for token.

Run: make test-parity.
"""

import functools

import jax
import numpy as np
import pytest

from llama_jax.convert import huggingface, huggingface_config
from llama_jax.generate.beam import beam_search
from llama_jax.generate.programs import Programs
from llama_jax.mesh import MeshConfig, make
from llama_jax.model.config import Compute
from tests.parity.cases import CASES, weights

pytestmark = pytest.mark.parity

NAME, T, PAD = 'llama3', 14, 0
ENDS = (7, 33, 90, 121, 143, 160, 181, 200)
BEAMS = 4


@functools.cache
def tensors():
    return weights(CASES[NAME], seed=1)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 256, n).tolist() for n in (3, 11, 1, 20)]


@functools.cache
def theirs():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = huggingface_config.config_to_huggingface(CASES[NAME])
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation='eager')).eval()
    model.load_state_dict({name: torch.tensor(x) for name, x in tensors().items()}, strict=True)
    return model


@functools.cache
def ours(ends):
    config = CASES[NAME]
    return Programs(
        config,
        huggingface.params_from_huggingface(tensors(), config),
        mesh=make(MeshConfig(), jax.devices()[:1]),
        compute=Compute(),
        end_ids=ends,
        pad_id=PAD,
    )


def generate(rules, ends):
    """Of every prompt: tokens up to the end id, and the scores."""
    import torch

    rows = prompts()
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        out = theirs().generate(
            ids,
            attention_mask=mask,
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            max_new_tokens=T,
            do_sample=False,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=list(ends) or None,
            return_dict_in_generate=True,
            output_scores=True,
            **rules,
        )
    found = []
    for tokens, score in zip(
        out.sequences[:, longest:].tolist(), out.sequences_scores, strict=True
    ):
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        found.append((tokens[:end], score.item()))
    return [found[i * BEAMS :][:BEAMS] for i in range(len(rows))]


@pytest.mark.parametrize('ends', [ENDS, ()], ids=['ends', 'endless'])
@pytest.mark.parametrize('early_stopping', [True, False, 'never'])
@pytest.mark.parametrize('length_penalty', [-1.0, 0.0, 1.0, 2.0])
def test_texts_and_scores_equal_transformers(length_penalty, early_stopping, ends):
    rules = dict(length_penalty=length_penalty, early_stopping=early_stopping)
    found = beam_search(ours(ends), prompts(), beams=BEAMS, n=BEAMS, max_tokens=T, **rules)
    expected = generate(rules, ends)
    for row, their_row in zip(found, expected, strict=True):
        assert [one.tokens for one in row] == [tokens for tokens, _ in their_row]
        scores = [score for _, score in their_row]
        np.testing.assert_allclose([one.score for one in row], scores, rtol=1e-5, atol=1e-4)
    if ends:
        assert len({len(one.tokens) for row in found for one in row}) > 1

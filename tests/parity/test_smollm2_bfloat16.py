"""Generation in bfloat16, as accelerators do it, beside float32: real weights, real text."""

import functools
import inspect
import textwrap

import jax
import numpy as np
import pytest

from llama_jax.generate import decode, programs
from llama_jax.generate.generator import Generator
from llama_jax.model.config import Compute
from tests.data.corpus import CHINESE
from tests.parity.smollm2 import logits_of, one, ours
from tests.parity.test_smollm2_transformers import PROMPTS

pytestmark = pytest.mark.parity

N = 24


@functools.cache
def generator(precision):
    model = ours()
    with pytest.MonkeyPatch.context() as patch:
        if precision == 'bfloat16':  # a CPU would compute in float32, in an order of its own
            patch.setattr(programs, 'is_cpu', lambda mesh: False)
        return Generator(
            model.config,
            model.params,
            mesh=one(),
            compute=Compute(precision=precision),
            eos_ids=(),
            pad_id=model.pad_id,
        )


def test_distributions_are_near_those_of_float32():
    model = ours()
    text = inspect.getsource(textwrap) + '\n'.join(CHINESE)
    token_T = model.vocabulary.encode(text)[:512]
    made = generator('bfloat16').programs
    assert made.params['embed_VD'].dtype == 'bfloat16'

    @jax.jit
    def logits(params, token_BT):
        x_BTD, _ = decode.features(made.model, params, token_BT)
        return decode.head(made.model, params, x_BTD)

    with jax.set_mesh(one()):
        found_TV = np.asarray(logits(made.params, token_T[None]), np.float64)[0]
    log_TV, expected_TV = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1)[:, None]
        for x in (found_TV, logits_of(model.params, token_T).astype(np.float64))
    )
    divergence_T = (np.exp(expected_TV) * (expected_TV - log_TV)).sum(-1)
    assert 1e-6 < divergence_T.mean() < 0.01
    assert divergence_T.max() < 0.1


def test_where_greedy_texts_part_each_token_is_likely_to_the_other():
    model = ours()
    prompts = [model.prompt(text) for text in PROMPTS[::2]]
    texts = [
        generator(precision)(prompts, max_tokens=N, logprobs=5)
        for precision in ('bfloat16', 'float32')
    ]
    parted = 0
    for pair in zip(*texts, strict=True):
        for here, there in zip(*(text.logprobs for text in pair), strict=True):
            if here.token != there.token:
                parted += 1
                assert here.token in [token for token, _ in there.top]
                assert there.token in [token for token, _ in here.top]
                break
    assert parted < len(prompts)

"""Generation in bfloat16, as accelerators do it, beside float32."""

import functools

import jax
import numpy as np
import pytest

from llama_jax.generate import programs
from llama_jax.generate.generator import Generator
from llama_jax.model.config import Compute
from tests.generate.tiny import CONFIG, mesh_of, prompt_of, weights

PROMPTS = [prompt_of(n) for n in (3, 9, 17, 30, 5, 24)]


@functools.cache
def texts(precision):
    """Greedy, and the log-probabilities of the prompts' tokens."""
    softer = jax.tree.map(lambda x: x * 0.5 if x.ndim > 2 else x, weights())
    with pytest.MonkeyPatch.context() as patch:
        if precision == 'bfloat16':
            patch.setattr(programs, 'is_cpu', lambda mesh: False)
        ours = Generator(
            CONFIG,
            softer,
            mesh=mesh_of(),
            compute=Compute(precision=precision),
            eos_ids=(),
            pad_id=0,
        )
    assert ours.programs.params['embed_VD'].dtype == precision
    return ours(PROMPTS, max_tokens=60, logprobs=20)


@pytest.mark.slow
def test_where_greedy_texts_part_each_token_is_likely_to_the_other():
    parted, compared = 0, []
    for pair in zip(texts('bfloat16'), texts('float32'), strict=True):
        for here, there in zip(*(one.logprobs for one in pair), strict=True):
            likely = dict(there.top)
            compared += [x - likely[token] for token, x in here.top if token in likely]
            if here.token != there.token:
                parted += 1
                assert here.token in [token for token, _ in there.top[:5]]
                assert there.token in [token for token, _ in here.top[:5]]
                break
    assert 0 < parted < len(PROMPTS), 'texts that part and texts that do not'
    assert len(compared) > 1000 and np.abs(compared).mean() < 0.1

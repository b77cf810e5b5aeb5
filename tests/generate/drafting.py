"""Models whose text repeats itself, and what drafting must leave as it is."""

import functools
from dataclasses import replace

import jax
import numpy as np

from llama_jax import trees
from llama_jax.generate.generator import Generator
from llama_jax.generate.quantized import NOTHING
from llama_jax.generate.speculative.draft import Draft
from llama_jax.model import layers
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of, weights

N = 30
PROMPTS = [prompt_of(n) for n in (1, 7, 16, 17, 30)]
SMALL = replace(CONFIG, layers=1, dim=16, heads=2, kv_heads=2, ffn=32)
CONTROLS = {
    'greedy': {},
    'drawn': {'temperature': [0.0, 1.0, 0.7, 2.0, 1.0], 'top_k': [0, 0, 9, 0, 5], 'top_p': 0.95},
    'all': {
        'temperature': [0.0, 0.0, 0.5, 1.0, 1.0],
        'repetition_penalty': [1.3, 1.0, 1.0, 1.2, 1.0],
        'presence_penalty': 0.5,
        'frequency_penalty': [0.0, 0.7, 0.0, 0.3, 0.0],
        'logit_bias': {5: 2.0, 7: -3.0},
        'min_tokens': [0, 9, 12, 3, 0],
        'stop_ids': (11, 40),
        'max_tokens': [N, 17, 29, 3, 1],
        'logprobs': [0, 3, None, 2, 1],
        'min_p': 0.02,
        'typical_p': 0.9,
    },
}


@functools.cache
def repeating():
    """Weights so small that the last token says most, and greedy text goes round."""
    return jax.tree.map(lambda x: x * 0.1 if x.ndim > 2 else x, weights())


@functools.cache
def generator(loops=True, quantization=NOTHING, config=CONFIG, axes=(), n=1, small=False):
    params = repeating() if loops else weights()
    if small:
        params = small_weights()
    return Generator(
        config,
        params,
        mesh=mesh_of(n, **dict(axes)),
        compute=COMPUTE,
        eos_ids=(3,),
        pad_id=0,
        prefill_chunk=16,
        quantization=quantization,
    )


@functools.cache
def small_weights():
    rng = np.random.default_rng(1)
    return trees.map_named(
        lambda path, x: np.float32(0.5 * rng.normal(size=x.shape) + ('scale' in path)),
        layers.abstract(SMALL),
    )


def by_small_model():
    return Draft(generator(config=SMALL, small=True).programs, n_draft=3)


def check_equal(ours, how, **settings):
    """Also how many tokens a run of the model gave, of all rows."""
    settings = {'max_tokens': N, 'seed': range(5), **settings}
    plain, drafted = ours(PROMPTS, **settings), ours(PROMPTS, speculate=how, **settings)
    for one, other in zip(plain, drafted, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert (a.token, len(a.top)) == (b.token, len(b.top))
            # Sums over several columns at a time, in another order.
            np.testing.assert_allclose(b.logprob, a.logprob, atol=1e-4)
            np.testing.assert_allclose([x for _, x in b.top], [x for _, x in a.top], atol=1e-4)
    counts = [one.speculation for one in drafted if one.speculation.steps]
    for one in counts:
        assert one.steps <= one.tokens <= one.steps + one.accepted
        assert one.accepted <= one.drafted <= how.n_draft * one.steps
    return sum(one.tokens for one in counts) / sum(one.steps for one in counts)

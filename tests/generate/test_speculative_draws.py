"""Drafts of a small model leave the distribution of what is drawn as it is."""

import itertools

import jax
import numpy as np
import pytest

from llama_jax.generate.generator import Generator
from llama_jax.generate.speculative.draft import Draft
from tests.generate.test_sampling import kept_by_sort
from tests.generate.tiny import COMPUTE, CONFIG, forward, generator, mesh_of, prompt_of, weights

GROUPS = (
    {'temperature': 3.0, 'top_k': 3},
    {'temperature': 5.0, 'top_k': 4, 'top_p': 0.8},
    {'temperature': 4.0, 'top_k': 5, 'min_p': 0.3},
    {'temperature': 4.0, 'top_k': 4, 'typical_p': 0.7},
)
NAMES = {'temperature': 'temperature', 'top_k': 'k', 'top_p': 'p'}
EACH, N, ROWS = 2048, 4, 64
"""Texts of a group; tokens of a text, the first of which is not drafted; texts at a time."""


def distribution(tokens, controls):
    """Oracle: of the next token, in float64."""
    logits = forward()(tokens)
    kept = kept_by_sort(logits, **{NAMES.get(name, name): x for name, x in controls.items()})
    weight = np.where(kept, np.exp((logits - logits.max()) / controls['temperature']), 0)
    return weight / weight.sum()


def texts(prompt, controls):
    """Every text of N tokens with its probability."""
    found = {(): 1.0}
    for _ in range(N):
        longer = {}
        for text, probability in found.items():
            share = distribution([*prompt, *text], controls)
            for token in np.flatnonzero(share):
                longer[(*text, int(token))] = probability * share[token]
        found = longer
    return found


@pytest.mark.slow
def test_the_distribution_is_that_of_the_model():
    prompt = prompt_of(4)
    rng = np.random.default_rng(0)
    near = jax.tree.map(lambda x: np.float32(x + 0.15 * rng.normal(size=x.shape)), weights())
    small = Generator(CONFIG, near, mesh=mesh_of(), compute=COMPUTE, eos_ids=(), pad_id=0)
    how = Draft(small.programs, n_draft=2)
    done = [
        one
        for controls in GROUPS
        for seed in range(0, EACH, ROWS)
        for one in generator()(
            [prompt] * ROWS,
            max_tokens=N,
            seed=range(seed, seed + ROWS),
            speculate=how,
            **controls,
        )
    ]
    accepted = sum(one.speculation.accepted for one in done)
    drafted = sum(one.speculation.drafted for one in done)
    assert 0.2 < accepted / drafted < 0.9, 'drafts of both kinds'
    for g, controls in enumerate(GROUPS):
        expected = texts(prompt, controls)
        drawn = [tuple(one.tokens) for one in done[g * EACH : (g + 1) * EACH]]
        assert set(drawn) <= set(expected)
        counts = dict(zip(expected, np.zeros(len(expected), int), strict=True))
        for text in drawn:
            counts[text] += 1
        # Texts of fewer than five expected together: their counts do not follow chi-square.
        rare = [text for text, share in expected.items() if share * EACH < 5]
        cells = [(counts[text], expected[text] * EACH) for text in expected if text not in rare]
        if rare:
            cells.append(
                (sum(counts[text] for text in rare), sum(expected[text] for text in rare) * EACH)
            )
        statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
        freedom = len(cells) - 1
        # Four standard deviations above the mean: with these many degrees the chance is below 1e-3
        # for one of the fixed seeds, and a wrong rule is far out.
        assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 5, (controls, statistic, freedom)
        assert freedom > 8
        for t in range(1, N):  # and of each token by itself
            share = dict.fromkeys(itertools.chain(*(text[t : t + 1] for text in expected)), 0.0)
            for text, probability in expected.items():
                share[text[t]] += probability
            for token, probability in share.items():
                count = sum(text[t] == token for text in drawn)
                spread = np.sqrt(EACH * probability * (1 - probability)) + 1
                assert abs(count - EACH * probability) < 5 * spread

"""Bounds and orders of diffusion models as an evaluation asks for them, against every mask."""

import itertools
import math

import numpy as np
import pytest

from llama_jax.evaluate import likelihood
from llama_jax.evaluate.scores import Scorer
from llama_jax.objectives.asked import Middle
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.diffusion import MaskedDiffusion
from tests.evaluate.conftest import COMPUTE, MODEL

N = 3
"""Tokens that are asked for."""


def scorer(question, mesh, params, tokenizer):
    return Scorer(
        *(MODEL, params),
        sees_all=question.sees_all,
        compute=COMPUTE,
        mesh=mesh,
        byte_lengths=tokenizer.byte_lengths,
        read=question.read,
    )


def nll(score, examples):
    """In nats, of all that bears weight."""
    weights = [e['weights'][e['weights'] > 0] for e in examples]
    found = score(examples).log_p
    return -sum(x[: len(w)] @ w for x, w in zip(found.astype(np.float64), weights, strict=True))


def text_of(tokenizer):
    ids = tokenizer.encode('def f(x): return 世界', continues=True)[:9]
    return Middle(ids[:4], ids[4 : 4 + N], ids[4 + N :])


@pytest.mark.slow
@pytest.mark.parametrize('objective', [MaskedDiffusion(), MaskedDiffusion(read_previous=True)])
def test_draws_of_a_bound_have_its_mean_and_their_standard_error(
    objective, mesh, params, tokenizer
):
    text, asked = text_of(tokenizer), objective.reading
    score = scorer(asked.rest, mesh, params, tokenizer)
    every, weight = [], []
    for k in range(1, N + 1):
        for s in itertools.combinations(range(N), k):
            example = objective._hidden(text, tokenizer, np.isin(np.arange(N), s), begin=True)
            example['weights'] *= N / k
            every.append(example)
            weight.append(1 / N / math.comb(N, k))
    wanted = sum(p * nll(score, [e]) for p, e in zip(weight, every, strict=True)) / math.log(2)

    texts = [text] * 12  # each under masks of its own
    answer = likelihood.ask(score, asked.rest, texts, tokenizer, seed=1)
    bits = likelihood.bits(answer, texts, tokenizer)
    error = likelihood.standard_error(answer, bits, asked.rest.draws) * bits.bytes.sum() / 12
    assert abs(bits.bits.mean() - wanted) < 4 * error
    # Stratified draws spread less than the error says, and it says no more than it has to.
    assert 0 < bits.bits.std(ddof=1) / math.sqrt(12) < 1.5 * error < 0.2 * wanted
    again = likelihood.ask(score, asked.rest, texts, tokenizer, seed=1)
    np.testing.assert_array_equal(again.scores.log_p, answer.scores.log_p)

    # The order from left to right: each token given those before it, and the suffix.
    first = [objective._hidden(text, tokenizer, np.arange(N) >= j, begin=True) for j in range(N)]
    by_hand = -sum(float(score([e]).log_p[0, 0]) for e in first)
    made = asked.middle.examples(text, tokenizer, np.random.default_rng(0))
    assert asked.middle.kind == 'order' and asked.rest.kind == 'bound'
    assert nll(score, made) == pytest.approx(by_hand, rel=1e-5)
    # A mask has no probability: what is left is all of it.
    one = score(made[:1])
    free = score([{**made[0], 'never': np.full_like(made[0]['never'], tokenizer.pad_id)}])
    assert one.log_p[0, 0] > free.log_p[0, 0]


def test_blocks_of_one_are_exact_and_larger_ones_are_bounds(mesh, params, tokenizer):
    text = text_of(tokenizer)._replace(suffix=np.zeros(0, np.int32))
    one, four = BlockDiffusion(block=1), BlockDiffusion(block=4)
    exact = one.reading.rest
    assert (exact.kind, four.reading.rest.kind) == ('exact', 'bound')
    score = scorer(exact, mesh, params, tokenizer)
    found = nll(score, exact.examples(text, tokenizer, np.random.default_rng(0)))
    # Each token by itself, a mask at the end of what is before it: what is behind is not there.
    alone = []
    for j in range(N):
        part = Middle(
            np.concatenate([text.prefix, text.middle[:j]]), text.middle[j : j + 1], text.suffix
        )
        (example,) = exact.examples(part, tokenizer, np.random.default_rng(0))
        alone.append(nll(score, [example]))
    assert found == pytest.approx(sum(alone), rel=1e-5)
    made = four.reading.rest.examples(text, tokenizer, np.random.default_rng(0))
    assert len(made) == four.reading.rest.draws
    # Of a text that is cut the rest of the block is masked in every draw, and bears no loss.
    cut = text._replace(middle=text.middle[:2])
    for e in four.reading.rest.examples(cut, tokenizer, np.random.default_rng(0)):
        n = len(e['inputs']) // 2
        assert n == 8 and e['inputs'][n - 1] == tokenizer.mask_id and not e['weights'][n - 1]
    # An end is asked for with all of its block, whose other tokens are ends too.
    ended = text._replace(middle=np.append(text.middle[:2], tokenizer.eos_id))
    for made_of, n in ((ended, 3), (ended._replace(middle=ended.middle[1:]), 2)):
        of_end = four.reading.rest.examples(made_of, tokenizer, np.random.default_rng(0))
        filled = -(1 + len(text.prefix) + n) % 4
        assert sum(e['weights'].sum() for e in of_end) == pytest.approx(n + filled)
        ends = [e['targets'][e['weights'] > 0].tolist().count(tokenizer.eos_id) for e in of_end]
        assert max(ends) == 1 + filled
    # Blocks of places 4 to 7 hold all three tokens: every number of masks has its share of draws.
    masks = [int((e['inputs'] == tokenizer.mask_id).sum()) for e in made]
    assert {1, 2, 3} == set(masks) and max(np.bincount(masks)) <= math.ceil(len(made) / 3) + 1
    assert sum(e['weights'].sum() for e in made) == pytest.approx(N)

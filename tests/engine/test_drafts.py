"""An engine that drafts gives every request what one without drafts gives it, in fewer steps."""

from dataclasses import replace

import numpy as np
import pytest

from llama_jax.engine.engine import Engine
from llama_jax.errors import UserError
from llama_jax.generate.controls import Controls
from llama_jax.generate.speculative.draft import Heads, Lookup
from llama_jax.model.patterns import Window
from tests.engine.asking import GREEDY, Only, ask, token_bytes
from tests.generate import test_sources as sources
from tests.generate.drafting import generator
from tests.generate.test_heads import generator as headed
from tests.generate.tiny import CONFIG, prompt_of

LOOKUP = Lookup(n_draft=5)
MIXED = [
    (5, replace(GREEDY, max_tokens=60)),
    (40, replace(GREEDY, max_tokens=30, logprobs=2, prompt_logprobs=1)),
    (16, Controls(temperature=0.9, top_p=0.9, seed=3, max_tokens=40)),
    (1, Controls(temperature=0.5, top_k=9, seed=5, max_tokens=25, repetition_penalty=1.3)),
    (33, replace(GREEDY, max_tokens=31, presence_penalty=1.0, frequency_penalty=0.5)),
    (
        23,
        Controls(
            temperature=1.0, seed=7, max_tokens=40, min_tokens=6, stop_ids=tuple(range(40, 56))
        ),
    ),
    (68, replace(GREEDY, max_tokens=60, ignore_end=True)),  # a whole row
    (17, replace(GREEDY, max_tokens=1)),
]


@pytest.fixture
def engines():
    """Makes two engines of one model: with drafts, and without."""
    made = []

    def make(programs, **sizes):
        sizes = {'rows': 2, 'length': 128, 'prefill_chunk': 16, 'steps': 4, **sizes}
        pair = [
            Engine(programs, token_bytes=token_bytes, speculate=how, **sizes)
            for how in (LOOKUP, None)
        ]
        made.extend(pair)
        return pair

    yield make
    for one in made:
        one.close()


def check_equal(drafts, plain, requests):
    both = [[ask(ours, prompt_of(n), how) for n, how in requests] for ours in (drafts, plain)]
    for drafted, one in zip(*both, strict=True):
        assert drafted.wait().tokens == one.wait().tokens
        assert (drafted.text, drafted.finish) == (one.text, one.finish)
        assert len(drafted.logprobs) == len(one.logprobs)
        for a, b in zip(drafted.logprobs, one.logprobs, strict=True):
            np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-4)


@pytest.mark.slow
def test_mixed_requests_and_fewer_steps(engines):
    drafts, plain = engines(generator().programs)
    check_equal(drafts, plain, MIXED)
    check_equal(drafts, plain, MIXED[::-1])  # rows that held others, and shared beginnings
    stats = drafts.stats()
    assert stats.drafted_tokens_total > stats.accepted_tokens_total > 100
    assert plain.stats().drafted_tokens_total == 0


@pytest.mark.slow
def test_heads_draft(engine):
    """As in a Generator: also where the prompt is shared, and after a row that chose its tokens."""
    drafts = engine(headed().programs, speculate=Heads(2), rows=1)
    greedy = replace(GREEDY, max_tokens=30, ignore_end=True)
    (whole,) = headed()([prompt_of(17)], max_tokens=30, ignore_end=True, speculate=Heads(2))
    for n in (1, 2, 3):
        if n == 3:
            bound = ask(drafts, prompt_of(8), Controls(max_tokens=4), grammar=Only({11}, {60}))
            assert bound.wait().tokens == [11, 60, 11, 60]
        assert ask(drafts, prompt_of(17), greedy).wait().tokens == whole.tokens
        stats = drafts.stats()
        assert stats.drafted_tokens_total == n * whole.speculation.drafted
        assert stats.accepted_tokens_total == n * whole.speculation.accepted > 0
    assert stats.cached_tokens_total == 16


@pytest.mark.slow
def test_text_without_repetition(engines):
    check_equal(*engines(generator(loops=False).programs), MIXED)


@pytest.mark.slow
def test_alone_a_row_that_repeats_itself_takes_few_steps(engines):
    drafts, _ = engines(generator().programs, rows=1)
    ask(drafts, prompt_of(5), replace(GREEDY, max_tokens=100, ignore_end=True)).wait()
    stats = drafts.stats()
    # Of 99 tokens after the first, those that were not drafted took a step each.
    assert stats.accepted_tokens_total > 60
    assert stats.steps_total < 60


@pytest.mark.slow
def test_a_stop_string_within_drafts(engines):
    drafts, plain = engines(generator().programs)
    whole = ask(plain, prompt_of(5), replace(GREEDY, max_tokens=60)).wait().text
    for at in (3, 20, 41):
        stop = replace(GREEDY, max_tokens=60, stop=(whole[at : at + 2],))
        check_equal(drafts, plain, [(5, stop)])


@pytest.mark.slow
def test_a_constrained_row_is_not_drafted_for(engines):
    drafts, plain = engines(generator().programs)
    heard = []
    for ours in (drafts, plain):
        free = ask(ours, prompt_of(5), replace(GREEDY, max_tokens=40))
        grammar = Only({11, 12}, {60, 61, 62})
        bound = ask(ours, prompt_of(8), Controls(max_tokens=12, seed=1), grammar=grammar)
        after = ask(ours, prompt_of(9), replace(GREEDY, max_tokens=40))
        heard.append([one.wait().tokens for one in (free, bound, after)])
    assert heard[0] == heard[1]


@pytest.mark.slow
def test_a_ring_and_several_devices(engines):
    config = replace(CONFIG, pattern=Window(6))
    axes = (('tensor', 2),)
    check_equal(*engines(generator(config=config, axes=axes, n=2).programs), MIXED)


@pytest.mark.slow
def test_drafts_that_go_round_leave_shared_beginnings_whole(engines):
    config = replace(CONFIG, pattern=Window(17))
    drafts, plain = engines(generator(config=config).programs, rows=1, length=32)
    prompt, other = prompt_of(20), [*prompt_of(20)[:16], *prompt_of(3)]
    for controls in (replace(GREEDY, max_tokens=12, ignore_end=True), replace(GREEDY, logprobs=0)):
        heard = [ask(ours, prompt, controls).wait() for ours in (drafts, plain)]
        assert heard[0].tokens == heard[1].tokens
        heard = [ask(ours, other, replace(GREEDY, logprobs=0)).wait() for ours in (drafts, plain)]
        np.testing.assert_allclose(*[[x.logprob for x in one.logprobs] for one in heard], atol=1e-4)


@pytest.mark.slow
def test_an_encoder_decoder(engines):
    pair = engines(sources.ours('llama').programs, source_length=32)
    for ours in pair:
        heard = [
            ask(ours, prompt_of(n), replace(GREEDY, max_tokens=40), source=prompt_of(n, seed=1))
            for n in (1, 17, 3)
        ]
        if ours is pair[0]:
            drafted = [one.wait().tokens for one in heard]
    assert drafted == [one.wait().tokens for one in heard]


@pytest.mark.slow
def test_nothing_compiles_once_it_is_warm(engines):
    drafts, plain = engines(generator().programs)
    check_equal(drafts, plain, MIXED)
    compiled = drafts._slots._on.steps._cache_size()
    check_equal(drafts, plain, [(n, replace(how, seed=9)) for n, how in MIXED[::2]])
    assert drafts._slots._on.steps._cache_size() == compiled <= len(drafts._slots.sizes)


def test_bad_numbers_of_drafts():
    with pytest.raises(UserError, match='n_draft 16: draft 1 to 15'):
        Engine(generator().programs, token_bytes=token_bytes, speculate=Lookup(n_draft=16))

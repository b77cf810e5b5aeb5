"""What begins alike is read once."""

import time
from dataclasses import replace

import pytest

from tests.engine.asking import GREEDY, ask
from tests.generate.tiny import prompt_of


def test_a_shared_beginning_is_read_once_and_changes_nothing(engine):
    ours, prompt = engine(rows=3), prompt_of(50)
    controls = replace(GREEDY, logprobs=1)
    first = ask(ours, prompt, controls).wait()
    again = ask(ours, prompt, controls).wait()
    assert (first.finish.cached_tokens, again.finish.cached_tokens) == (0, 48)
    longer = [*prompt[:40], *prompt_of(9, seed=1)]
    fresh = ask(engine(), longer, controls).wait()
    forked = ask(ours, longer, controls).wait()
    assert (fresh.finish.cached_tokens, forked.finish.cached_tokens) == (0, 32)
    for one, other in ((first, again), (fresh, forked)):
        assert one.tokens == other.tokens and one.logprobs == other.logprobs
    # A prompt of whole pieces: its last token is read again, to know what follows it.
    assert ask(ours, prompt[:48], controls).wait().finish.cached_tokens == 32
    # Nobody is told of the prompts of others, nor answered sooner for them.
    asked = [ask(ours, prompt, controls, owner=owner).wait() for owner in ('a', 'b', 'a', 'b', '')]
    assert [one.finish.cached_tokens for one in asked] == [0, 0, 48, 48, 48]
    assert all(one.tokens == first.tokens for one in asked)
    asked = [ask(ours, prompt, controls, owner=owner).wait() for owner in ('c', '')]
    assert [one.finish.cached_tokens for one in asked] == [0, 48]


@pytest.mark.slow
def test_a_busy_rows_beginning_is_copied(engine):
    ours, prompt = engine(rows=3, steps=1), prompt_of(40)
    running = ask(ours, prompt, replace(GREEDY, max_tokens=80))
    while not running:
        time.sleep(0.001)
    assert ask(ours, prompt, owner='another').wait().finish.cached_tokens == 0
    other = ask(ours, prompt, replace(GREEDY, max_tokens=80)).wait()
    assert other.finish.cached_tokens == 32
    assert running.wait().tokens == other.tokens

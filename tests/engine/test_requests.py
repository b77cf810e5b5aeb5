"""How a text ends, and what constrains it."""

import time
from dataclasses import replace

import numpy as np
import pytest

from llama_jax.engine.request import Request
from llama_jax.errors import UserError
from llama_jax.generate.controls import Controls
from tests.engine.asking import GREEDY, Only, ask, text_of
from tests.generate.tiny import prompt_of, uncached


@pytest.mark.slow
def test_stop_strings(engine):
    ours = engine()
    tokens = uncached(prompt_of(9), 12)
    whole = text_of(tokens)
    assert len(set(zip(whole, whole[1:], strict=False))) == 11, 'no pair comes twice'
    for stop, kept in (
        ((whole[5:7],), whole[:5]),
        ((whole[3:5], whole[2:4]), whole[:2]),
        ((whole[11] + 'x',), whole),  # its beginning is held back, and comes in the end
        (('x',), whole),
    ):
        one = ask(ours, prompt_of(9), replace(GREEDY, stop=stop)).wait()
        assert one.text == kept
        assert one.finish.reason == ('length' if kept == whole else 'stop')


@pytest.mark.slow
def test_a_grammar_is_obeyed_beside_free_rows(engine):
    ours = engine()
    drawn = Controls(
        max_tokens=30, seed=2, repetition_penalty=1.3, logit_bias={7: 1.0}, min_tokens=9, logprobs=1
    )
    asked = [(5, replace(GREEDY, max_tokens=30, logprobs=1)), (7, drawn)]
    alone = [ask(ours, prompt_of(n), controls).wait() for n, controls in asked]
    free = [ask(ours, prompt_of(n), controls) for n, controls in asked]
    grammar = Only({11, 12}, {60, 61, 62}, {3})
    controls = Controls(max_tokens=9, seed=1, logit_bias={12: 100.0})
    bound = ask(ours, prompt_of(8), controls, grammar=grammar).wait()
    assert all(token in turn for token, turn in zip(bound.tokens, grammar.turns * 3, strict=True))
    assert set(bound.tokens[::3]) == {12} and set(bound.tokens[2::3]) == {3}
    assert grammar.seen == bound.tokens[:-1]
    for one, other in zip(free, alone, strict=True):
        assert one.wait().tokens == other.tokens
        chances, expected = ([x.logprob for x in heard.logprobs] for heard in (one, other))
        # Another number of rows sums in another order: by 3.4e-5 on a processor with AVX2 alone.
        np.testing.assert_allclose(chances, expected, atol=5e-5)
    # The slot's next text is free of it.
    assert ask(ours, prompt_of(8), asked[0][1]).wait().tokens == uncached(prompt_of(8), 30)


def test_the_device_computes_while_masks_are_made(engine, monkeypatch):
    ours, happened = engine(rows=2), []

    class Told(Only):
        def mask(self):
            happened.append('mask')
            return super().mask()

        def accept(self, token):
            self.seen.append(token)

    for name in ('ahead', 'choose'):
        run = getattr(ours._slots, name)
        monkeypatch.setattr(
            ours._slots,
            name,
            lambda *given, run=run, name=name: happened.append(name) or run(*given),
        )
    free = ask(ours, prompt_of(5), replace(GREEDY, max_tokens=20))
    bound = ask(ours, prompt_of(8), replace(GREEDY, max_tokens=6), grammar=Told({11}, {12})).wait()
    assert bound.tokens == [11, 12] * 3 and len(free.wait().tokens) == 20
    first = happened.index('choose')
    # The logits of a token are on their way before the mask of the one before is asked for.
    assert happened[first : first + 6] == ['choose', 'ahead', 'mask'] * 2


class Fails(Only):
    """Knows no more after some tokens."""

    def mask(self):
        if len(self.seen) == 3:
            raise ValueError('no token is left')
        return super().mask()

    def accept(self, token):
        self.seen.append(token)


def test_a_grammar_that_fails_ends_its_request_only(engine):
    ours = engine()
    free = ask(ours, prompt_of(5), replace(GREEDY, max_tokens=30))
    bound = ask(ours, prompt_of(8), GREEDY, grammar=Fails({11})).wait()
    assert bound.finish.reason == 'error' and bound.finish.message == 'no token is left'
    at_once = Fails({11})
    at_once.seen = [11] * 3
    assert ask(ours, prompt_of(8), GREEDY, grammar=at_once).wait().finish.reason == 'error'
    assert free.wait().tokens == uncached(prompt_of(5), 30)
    for controls in (replace(GREEDY, min_tokens=2), replace(GREEDY, ignore_end=True)):
        with pytest.raises(UserError, match='a grammar says where the text ends'):
            ask(ours, prompt_of(8), controls, grammar=Only({11}))


def test_what_was_held_back_comes_with_the_end(engine):
    ours = engine(rows=1, steps=1, length=256)
    controls = replace(GREEDY, max_tokens=200, ignore_end=True)
    whole = ask(ours, prompt_of(5), replace(controls, max_tokens=12)).wait().text
    # All of the text may be the beginning of this string.
    held = replace(controls, stop=(whole + 'x',), logprobs=0)
    one = ask(ours, prompt_of(5), held)
    while ours.stats().generated_tokens_total < 12 + 3:
        time.sleep(0.001)
    one.ticket.cancel()
    assert one.wait().finish.reason == 'cancelled'
    n = one.finish.completion_tokens
    assert 0 < n < 200 and len(one.tokens) == len(one.logprobs) == n
    assert one.text[:12] == whole[:n] and len(one.text) == n


def test_a_caller_that_fails_to_hear_ends_its_own_request(engine, caplog):
    ours = engine()

    def deaf(event):
        raise ValueError('the queue of this caller is full')

    ours.submit(Request(prompt_of(9), replace(GREEDY, max_tokens=90)), deaf)
    assert ask(ours, prompt_of(5)).wait().tokens == uncached(prompt_of(5), 12)
    while ours.stats().rows_busy:
        time.sleep(0.001)
    assert ours.alive and ours.stats().requests_total == {'cancelled': 1, 'length': 1}
    assert 'on_event of a request failed' in caplog.text

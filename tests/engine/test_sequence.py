"""What becomes of drawn tokens on the host: where a text stops, and what is told of its end."""

import pytest

from llama_jax.engine.request import Finish, Piece, Request
from llama_jax.engine.sequence import SequenceState, StopStrings
from llama_jax.generate.controls import Controls, Logprob

NAMES = {1: '<|im_start|>', 2: '<tool>'}
WORDS = {1: '', 2: '', 3: ' ', 4: 'ab', 5: 'c', 6: '<|im_', 7: 'start|>', 8: '你'}


def told(tokens, *, end_ids=(), logprobs=None, drop_space=False, **controls):
    """Text, tokens and last event of a sequence whose tokens arrive two at a time."""
    events = []
    sequence = SequenceState(
        Request([9], Controls(logprobs=logprobs, **controls), drop_space=drop_space),
        events.append,
        token_bytes=lambda token: WORDS[token].encode() if token in WORDS else b'x',
        end_ids=end_ids,
        names=NAMES,
    )
    for i in range(0, len(tokens), 2):
        if not sequence.finished:
            pair = tokens[i : i + 2]
            scores = [Logprob(t, -float(t)) for t in pair] if logprobs is not None else ()
            sequence.add(pair, scores)
    sequence.finish('cancelled')
    pieces = [event for event in events if isinstance(event, Piece)]
    assert isinstance(events[-1], Finish)
    text = ''.join(piece.text for piece in pieces)
    return text, [t for piece in pieces for t in piece.tokens], events[-1]


@pytest.mark.parametrize(
    ('stop', 'least', 'tokens', 'text', 'n'),
    [
        ([' '], 0, [4, 3, 4, 3, 4], 'ab', 2),
        ([' '], 2, [4, 3, 4, 3, 4], 'ab ab', 4),  # that of the second token does not count
        ([' '], 3, [4, 3, 4, 3, 4], 'ab ab', 4),
        ([' '], 4, [4, 3, 4, 3, 4], 'ab ab ab', 5),
        # Its beginning may stand among the first tokens; what ended there is not found again.
        (['b c'], 2, [4, 3, 5, 4], 'a', 3),
        (['b ', 'b cab'], 2, [4, 3, 5, 4], 'a', 4),
        (['bc', 'cabx'], 2, [4, 5, 4, 4], 'abcabab', 4),
    ],
)
def test_no_stop_string_ends_with_the_first_tokens(stop, least, tokens, text, n):
    found = told(tokens, stop=tuple(stop), min_tokens=least)
    assert found[:2] == (text, tokens[:n])
    assert found[2].completion_tokens == n


@pytest.mark.parametrize(
    ('stop', 'tokens', 'text', 'n'),
    [
        (['<|im_start|>'], [4, 5, 1, 4], 'abc', 3),
        (['<|im_start|>'], [6, 5, 6, 7, 4], '<|im_c', 4),  # the text spells it
        (['<|im_start|>ab'], [8, 1, 5, 1, 4, 5], '你c', 5),  # the name is no part of the text
        (['c<|im_start|>'], [4, 1, 5, 2, 5, 1], 'abcc'[:3], 6),
        (['<tool>x'], [2, 4], 'ab', 2),
        (['tool', 'o'], [2, 4], 'ab', 2),  # a part of a name is none
        ([], [1, 4], 'ab', 2),
    ],
)
def test_a_stop_string_names_a_control_token(stop, tokens, text, n):
    assert told(tokens, stop=tuple(stop))[:2] == (text, tokens[:n])


def test_a_text_that_is_shown_is_looked_at_once():
    events = []
    request = Request([9], Controls(stop=('<tool><tool>',)), shown={2: b'<tool>'})
    sequence = SequenceState(
        request,
        events.append,
        token_bytes=lambda token: b'x' * (token == 4),
        end_ids=(),
        names=NAMES,
    )
    sequence.add([2, 4])
    assert not sequence.finished and events[0].text == '<tool>x'


def test_the_end_has_its_log_probability():
    for ends in ({'end_ids': [5]}, {'stop_ids': (5,)}):
        text, tokens, finish = told([4, 4, 3, 5, 4], logprobs=0, **ends)
        assert (text, tokens, finish.reason) == ('abab ', [4, 4, 3], 'stop')
        assert finish.end == Logprob(5, -5.0) and finish.completion_tokens == 3
    assert told([4, 5], end_ids=[5])[2].end is None, 'nobody asks'
    assert told([4, 4], end_ids=[5], logprobs=0, max_tokens=2)[2].end is None, 'there is none'


def test_without_a_seed_every_request_has_one_of_its_own():
    def seed(**controls):
        request = Request([9], Controls(**controls))
        given = {'token_bytes': lambda token: b'', 'end_ids': (), 'names': {}}
        return SequenceState(request, print, **given).controls.seed

    assert len({seed() for _ in range(4)}) == 4
    assert seed(seed=3) == seed(seed=3) == 3


def test_what_was_held_back_is_passed_on_once():
    stop = StopStrings(['abc'])
    assert stop('xab') == 'x' and stop('ab') == 'ab' and stop.finish() == 'ab'
    assert stop.finish() == '' and not stop.found


@pytest.mark.parametrize(('drop_space', 'text'), [(False, '  ab ab'), (True, ' ab ab')])
def test_an_answer_begins_without_the_space_of_its_tokenizer(drop_space, text):
    assert told([1, 3, 3, 4, 3, 4], drop_space=drop_space)[:2] == (text, [1, 3, 3, 4, 3, 4])

"""Rows of real data sets of preferences, in the shapes that people publish them."""

import pytest

from llama_jax.data.record import BadRecordError, Preference
from llama_jax.data.schemas import record_of
from tests.data.test_schemas import A, B, Q, assistant, said, share, user

HH = '\n\nHuman: q\n\nAssistant: x\n\nHuman: r: Human: s\n\nAssistant: '
HH_PROMPT = (Q, assistant('x'), user('r: Human: s'))
PREFERENCES = {
    'texts': (dict(prompt='q ', chosen='a', rejected='b'), ('q ', 'a', 'b')),
    # A short prompt that both answers happen to begin with is part of them.
    'texts that echo': (dict(prompt='Hi', chosen='Hi a', rejected='Hi b'), ('Hi', 'Hi a', 'Hi b')),
    'an input that is no object': (
        dict(input='q', preferred_output=[A], chosen='a', rejected='b'),
        ((Q,), (A,), (B,)),
    ),
    'no prompt': (
        dict(chosen='The sky is blue', rejected='The sky is black'),
        ('The sky is', ' blue', ' black'),
    ),
    'messages': (dict(prompt=[Q], chosen=[A], rejected=[B]), ((Q,), (A,), (B,))),
    'messages that repeat': (dict(prompt=[Q], chosen=[Q, A], rejected=[Q, B]), ((Q,), (A,), (B,))),
    'UltraFeedback': (
        dict(prompt='q ', chosen=[Q, A], rejected=[Q, B], messages=[Q, A], score_chosen=8.0),
        ((Q,), (A,), (B,)),
    ),
    'implicit': (dict(chosen=[Q, A], rejected=[Q, B]), ((Q,), (A,), (B,))),
    'HH': (dict(chosen=f'{HH}a', rejected=f'{HH}b'), (HH_PROMPT, (A,), (B,))),
    'LLaMA-Factory': (
        dict(
            conversations=[share('human', 'q')],
            chosen=share('gpt', 'a'),
            rejected=share('gpt', 'b'),
        ),
        ((Q,), (A,), (B,)),
    ),
    'LLaMA-Factory, v1': (
        dict(chosen_messages=[Q, A], rejected_messages=[Q, B]),
        ((Q,), (A,), (B,)),
    ),
    'Alpaca': (dict(instruction='q', input='', chosen='a', rejected='b'), ((Q,), (A,), (B,))),
    'Orca pairs': (
        dict(system='s', question='q', chosen='a', rejected='b'),
        ((said('system', 's'), Q), (A,), (B,)),
    ),
    'OpenAI': (
        dict(input=dict(messages=[Q]), preferred_output=[A], non_preferred_output=[B]),
        ((Q,), (A,), (B,)),
    ),
    'of different lengths': (
        dict(chosen=[Q, A], rejected=[Q, A, Q, B]),
        ((Q,), (A,), (A, Q, B)),
    ),
    'answers of several turns': (
        dict(prompt=[Q], chosen=[A, Q, A], rejected=[A, Q, B]),
        ((Q,), (A, Q, A), (A, Q, B)),
    ),
}


@pytest.mark.parametrize('name', PREFERENCES)
def test_preferences(name):
    fields, wanted = PREFERENCES[name]
    assert record_of(fields, Preference) == Preference(*wanted)
    assert record_of(dict(fields, margin=2), Preference).margin == 2


@pytest.mark.parametrize(
    ('fields', 'problem'),
    [
        (dict(prompt='q', chosen='a', rejected='a'), 'chosen and rejected are equal'),
        (dict(chosen=[Q, A], rejected=[Q, A]), 'chosen and rejected are equal'),
        (dict(chosen=f'{HH}a', rejected=f'{HH}a'), 'chosen and rejected are equal'),
        (dict(prompt='q', chosen='a', rejected=' '), 'rejected is empty'),
        (dict(prompt='q', chosen='a'), 'no rejected'),
        (dict(chosen=[A], rejected=[B]), 'no prompt'),
        (dict(chosen=[Q, A], rejected=[user('r'), B]), 'begin differently'),
        (dict(prompt=[Q], chosen=[A, Q], rejected=[B]), 'chosen ends with the user'),
        (dict(prompt='q', chosen='a', rejected=[B]), 'a text and messages'),
        (dict(prompt='q', chosen='a', rejected='b', margin=-1), 'margin is -1'),
        (dict(prompt='q', chosen='a', rejected='b', margin='2'), "margin is '2'"),
    ],
)
def test_preferences_without_one(fields, problem):
    with pytest.raises(BadRecordError, match=problem):
        record_of(fields, Preference)

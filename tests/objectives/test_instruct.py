"""Instruction tuning: which tokens bear loss, with which weight, and what is refused."""

import dataclasses

import numpy as np
import pytest

from llama_jax.data.record import BadRecordError, Chat
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.text.chat import FORMATS
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.template import Template
from tests.objectives import reading
from tests.objectives.records import batch_of, example

TOKENIZER = bytes_tokenizer()
LLAMA2 = FORMATS['llama2']
OBJECTIVE = InstructionTuning()
# A template that drops the thoughts of all answers but the last.
DROPS = Template(
    "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt }}"
)


def chat(*texts, weights=None, roles=('user', 'assistant')):
    messages = tuple({'role': roles[i % 2], 'content': text} for i, text in enumerate(texts))
    if weights is None:
        weights = [float(message['role'] == 'assistant') for message in messages]
    return Chat(messages, tuple(weights))


def learnt(record, **settings):
    """Targets that bear loss, as text with their weights."""
    made = example(OBJECTIVE, record, TOKENIZER, chat=LLAMA2, **settings)
    at = made['weights'] > 0
    text = TOKENIZER.decode(made['targets'][at], show_control=True)
    return text, sorted(set(made['weights'][at].tolist()))


def test_answers_and_their_ends_bear_loss():
    assert learnt(chat('hi', 'yes')) == ('yes </s>', [1.0])
    assert learnt(chat('hi', 'yes', 'so', 'no')) == ('yes </s>no </s>', [1.0])
    assert learnt(chat('hi', 'yes', 'so', 'no', weights=[0, 0.5, 0, 2])) == (
        'yes </s>no </s>',
        [0.5, 2.0],
    )
    assert learnt(chat('hi', 'yes', 'so', 'no', weights=[0, 0, 0, 1])) == ('no </s>', [1.0])
    assert learnt(chat('hi', 'yes', weights=[1, 1]))[0] == 'hiyes </s>'


def test_each_token_predicts_the_next():
    record = chat('hi', 'yes')
    made = example(OBJECTIVE, record, TOKENIZER, chat=LLAMA2)
    ids = OBJECTIVE.encoded(record, vocabulary=TOKENIZER, chat=LLAMA2).parts[0]
    assert np.array_equal(made['inputs'], ids[:-1]) and np.array_equal(made['targets'], ids[1:])
    assert ids[0] == TOKENIZER.bos_id and (ids == TOKENIZER.bos_id).sum() == 1
    assert ids[-1] == TOKENIZER.eos_id


def test_a_cut_chat_is_learnt_up_to_the_cut_or_not_at_all():
    record = chat('hi', 'yes', 'so', 'no')
    n = len(example(OBJECTIVE, record, TOKENIZER, chat=LLAMA2)['inputs'])
    whole, _ = learnt(record)
    for room in range(1, n + 1):
        made = example(OBJECTIVE, record, TOKENIZER, chat=LLAMA2, room=(room,))
        if made is None:
            assert room < n / 2
            continue
        assert {len(values) for values in made.values()} == {room} and made['weights'].any()
        assert whole.startswith(learnt(record, room=(room,))[0])


def test_last_answers_alone():
    """The remedy for templates that drop the thoughts of earlier answers."""
    last = dataclasses.replace(OBJECTIVE, answers='last')
    assert last.encoding != OBJECTIVE.encoding
    record = chat('hi', '<think>1</think>yes', 'so', '<think>2</think>no')
    with pytest.raises(BadRecordError, match='a part of message 1'):
        example(OBJECTIVE, record, TOKENIZER, chat=DROPS)
    made = example(last, record, TOKENIZER, chat=DROPS)
    text = TOKENIZER.decode(made['targets'][made['weights'] > 0], show_control=True)
    assert text == '<think>2</think>no</s>'


@pytest.mark.parametrize(
    ('record', 'format_', 'said'),
    [
        (chat('hi', 'yes', weights=[0, 0]), LLAMA2, 'no message is learnt'),
        (chat('hi', 'yes', 'so'), LLAMA2, 'ends with a message of the user'),
        (chat('hi', ' '), LLAMA2, 'nothing of message 1'),
        (chat('hi', 'yes', roles=('assistant', 'user'), weights=[1, 1]), LLAMA2, 'has the turn'),
        (chat('hi', 'yes'), FORMATS['chatml'], r'the vocabulary has no <\|im_start\|>'),
        (chat('hi', 'yes'), Template("{{ raise_exception('no') }}"), 'refuses: no'),
        (chat('hi', 'a [INST]'), LLAMA2, 'take it out'),
        (Chat((), ()), LLAMA2, 'no message is learnt'),
        (Chat(chat('hi', 'yes').messages, (0, 1), ({'name': 'f'},)), LLAMA2, 'tools are given'),
    ],
)
def test_bad_chats_are_refused(record, format_, said):
    with pytest.raises(BadRecordError, match=said):
        OBJECTIVE.encoded(record, vocabulary=TOKENIZER, chat=format_)


def test_chats_without_a_format_are_refused():
    with pytest.raises(UserError, match='no chat template.*--data.chat, such as chatml'):
        OBJECTIVE.encoded(chat('hi', 'yes'), vocabulary=TOKENIZER, chat=None)
    with pytest.raises(UserError, match='instruction tuning trains a decoder alone'):
        OBJECTIVE.check(ModelConfig(vocab=1, encoder_layers=1, **SIZES))


SIZES = {'dim': 8, 'layers': 1, 'heads': 1, 'kv_heads': 1, 'head_dim': 8, 'ffn': 8, 'context': 8}
RECORDS = [
    chat('hi', 'yes'),
    chat('so', 'no way'),
    chat('a', 'b', 'c', 'd', weights=[0, 0.5, 0, 2]),
]


def test_packed_chats_have_the_losses_of_each_alone():
    """And the loss is the mean over learnt tokens, each times its weight."""
    packed = batch_of(OBJECTIVE, [RECORDS[:2], RECORDS[2:]], TOKENIZER, chat=LLAMA2)
    together = reading.loss(OBJECTIVE, reading.DECODER, packed)
    apart = [
        reading.loss(
            OBJECTIVE, reading.DECODER, batch_of(OBJECTIVE, [[one], []], TOKENIZER, chat=LLAMA2)
        )
        for one in RECORDS
    ]
    np.testing.assert_allclose(together.total, sum(one.total for one in apart), rtol=1e-6)
    assert together.weight == sum(one.weight for one in apart) == packed['weights'].sum()
    assert OBJECTIVE.loss_tokens(packed) == np.count_nonzero(packed['weights'])
    assert packed['weights'].sum() == 5 + 8 + 0.5 * 3 + 2 * 3
    np.testing.assert_array_equal(together.total, together.metrics['nll'])  # no z-loss by default


def test_what_is_learnt_is_told_by_what_is_before_it_in_its_chat():
    batch = batch_of(OBJECTIVE, [[chat('hi', 'y'), chat('s', 'n')]], TOKENIZER, chat=LLAMA2)
    moved = reading.reach(OBJECTIVE, reading.DECODER, batch)
    segment_T, place_T = batch['segments'][0], np.arange(batch['segments'].shape[1])
    expected = reading.same(segment_T, segment_T) & (place_T[:, None] >= place_T)
    assert np.array_equal(moved[segment_T > 0], expected[segment_T > 0])


def test_sizes():
    assert OBJECTIVE.whole((9,), seq_len=4) == (8,) and OBJECTIVE.whole((1,), seq_len=4) is None
    assert OBJECTIVE.reads is Chat and not OBJECTIVE.has_likelihood and not OBJECTIVE.ends

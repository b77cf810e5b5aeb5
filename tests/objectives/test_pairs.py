"""Two answers to a prompt as token ids: what is learnt of them, and what is refused.

Most of these went wrong elsewhere: a begin token before the answers as well (axolotl #1616), a
second end behind a chat (trl #4481), a prompt whose last token depends on the answer (trl #1153), a
vocabulary without a begin token (trl #1885).
"""

import numpy as np
import pytest

from llama_jax.data.record import BadRecordError, Preference
from llama_jax.errors import UserError
from llama_jax.objectives.classify import Classification
from llama_jax.objectives.contrastive import InfoNCE, places
from llama_jax.objectives.preference import DPO
from llama_jax.objectives.reward import RewardModel
from llama_jax.text.chat import FORMATS, Conversation
from llama_jax.text.template import Template
from tests.objectives import records, texts
from tests.text.chats import NAMES, Bytes

BYTES = Bytes()
USER = ({'role': 'user', 'content': 'Name a colour.'},)
ASKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def answer(text):
    return ({'role': 'assistant', 'content': text},)


CHAT = Preference(USER, answer('red'), answer('loud'))


def encoded(record, vocabulary=BYTES, chat=None, objective=None):
    return (objective or DPO()).encoded(record, vocabulary=vocabulary, chat=chat)


def learnt(made, vocabulary=BYTES):
    """The tokens that bear loss of both answers, and those before."""
    return [
        (vocabulary.read(ids[weight > 0]), vocabulary.read(ids[weight == 0]))
        for ids, weight in zip(made.parts, made.weights, strict=True)
    ]


def test_a_text_begins_once_and_each_answer_ends_once():
    made = encoded(Preference('2 + 2 =', ' 4', ' 5'))
    assert learnt(made) == [
        ([' 4', '</s>'], ['<s>', '2 + 2 =']),
        ([' 5', '</s>'], ['<s>', '2 + 2 =']),
    ]


def test_a_vocabulary_may_have_no_begin_token():
    vocabulary = Bytes(tuple(name for name in NAMES if name != '<s>'))
    made = encoded(Preference('a', 'b', 'c'), vocabulary)
    assert learnt(made, vocabulary)[0] == (['b', '</s>'], ['a'])


@pytest.mark.parametrize('name', ['bpe', 'llama', 'byte-level'])
def test_the_prompt_has_the_same_tokens_before_both_answers(name):
    tokenizer = texts.tokenizer(name)
    prompt = '[INST] How is the stock price? [/INST] '
    made = encoded(Preference(prompt, '46 as of 10am', '$46 as of 10am'), tokenizer)
    before = [ids[weight == 0] for ids, weight in zip(made.parts, made.weights, strict=True)]
    np.testing.assert_array_equal(*before)
    np.testing.assert_array_equal(before[0], [tokenizer.bos_id, *tokenizer.encode(prompt)])
    assert [tokenizer.decode(ids) for ids in made.parts] == [
        f'{prompt}46 as of 10am',
        f'{prompt}$46 as of 10am',
    ]


@pytest.mark.parametrize('chat', [FORMATS['llama3'], Template(ASKED)], ids=['llama3', 'template'])
def test_a_chat_is_the_prompt_that_asks_and_the_answer_up_to_the_end_of_its_turn(chat):
    made = encoded(CHAT, chat=chat)
    asked = chat.encode(Conversation(USER), BYTES, begin=(BYTES.bos_id,))
    end = '<|eot_id|>' if chat is FORMATS['llama3'] else '<|im_end|>'
    for ids, (own, _), text in zip(made.parts, learnt(made), ('red', 'loud'), strict=True):
        assert ids[: len(asked)].tolist() == asked
        assert own == [text, end]
        whole = Conversation((*USER, *answer(text)), add_generation_prompt=False)
        written = chat.encode(whole, BYTES, begin=(BYTES.bos_id,))
        assert written[: len(ids)] == ids.tolist()  # a line break behind the end is left out


def test_an_answer_of_several_messages_learns_those_of_the_assistant():
    more = (*answer('red'), {'role': 'user', 'content': 'Sure?'}, *answer('yes'))
    made = encoded(Preference(USER, more, answer('no')), chat=Template(ASKED))
    own, _ = learnt(made)[0]
    assert own == ['red', '<|im_end|>', 'yes', '<|im_end|>']


def test_tokens_of_the_format_bear_no_loss_where_they_are_masked():
    objective = DPO(mask_format=True)
    made = encoded(CHAT, chat=FORMATS['llama3'], objective=objective)
    assert [own for own, _ in learnt(made)] == [['red'], ['loud']]
    assert [ids[-1] for ids in made.parts] == [BYTES.control['<|eot_id|>']] * 2
    made = encoded(Preference('a', 'b', 'c'), objective=objective)
    assert [own for own, _ in learnt(made)] == [['b'], ['c']]
    assert objective.encoding != DPO().encoding


def test_example_has_each_answer_in_a_stream_with_what_is_known_of_it():
    made = records.example(DPO(), Preference('ab', 'c', 'de'), BYTES)
    assert made['chosen/inputs'].tolist() == [BYTES.bos_id, *b'abc']
    assert made['chosen/targets'].tolist() == [*b'abc', BYTES.eos_id]
    assert made['chosen/weights'].tolist() == [0, 0, 1, 1]
    assert made['rejected/weights'].tolist() == [0, 0, 1, 1, 1]
    read = records.example(RewardModel(), Preference('ab', 'c', 'de', margin=2.0), BYTES)
    assert read['rejected/inputs'].tolist() == [BYTES.bos_id, *b'abde', BYTES.eos_id]
    assert read['rejected/weights'].tolist() == [0, 0, 0, 0, 0, 1]
    assert (read['chosen/margin'] == 2).all()


@pytest.mark.parametrize('seq_len', [16, 64, 1024])
@pytest.mark.parametrize('objective', [DPO(), RewardModel(), InfoNCE(), Classification()])
def test_a_row_is_packed_with_as_many_segments_as_the_loss_has_places(objective, seq_len):
    """One more would be in no sum."""
    (length,) = set(objective.lengths(seq_len).values())
    assert objective.segments(seq_len) == places(np.ones((1, length))).shape[1]


def test_cut_answers_lose_their_ends_and_equal_ones_give_no_example():
    record = Preference('ab', 'cdef', 'cdxyz')
    for objective in (DPO(), RewardModel()):
        places = 4 + (not objective.predicts)
        cut = records.example(objective, record, BYTES, room=(places + 1, places + 1))
        assert cut['chosen/inputs'].tolist()[:4] == [BYTES.bos_id, *b'abc']
        assert records.example(objective, record, BYTES, room=(places, places)) is None
        gone = places - 2
        assert records.example(objective, record, BYTES, room=(gone, gone)) is None
    weights = records.example(DPO(), record, BYTES, room=(5, 5))['chosen/weights']
    assert weights.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ('record', 'objective', 'chat', 'match'),
    [
        (Preference('a', 'b', 'b'), DPO(), None, 'equal'),
        (Preference('a', 'b', 'c', margin=1.0), DPO(), None, 'margin of 1'),
        (Preference('a', '', 'c'), DPO(mask_format=True), None, 'chosen has no token'),
        (Preference(USER, 'b', 'c'), DPO(), FORMATS['llama3'], 'the other messages'),
        (Preference(USER, USER, answer('a')), DPO(), FORMATS['llama3'], 'assistant'),
        (
            Preference(USER, answer('red'), (*answer('loud'), *USER, *answer('no'))),
            DPO(),
            Template(
                '{{ messages | length }}{% for m in messages %}'
                "{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
            ),
            'otherwise before one answer',
        ),
    ],
    ids=['equal', 'margin', 'format alone', 'kinds', 'no answer', 'prompt'],
)
def test_pairs_that_cannot_be_learnt_are_refused(record, objective, chat, match):
    with pytest.raises(BadRecordError, match=match) as error:
        encoded(record, chat=chat, objective=objective)
    assert '\n' not in str(error.value)


def test_messages_need_a_chat_format():
    with pytest.raises(UserError, match=r'--data\.chat'):
        encoded(CHAT)

"""Chats as token ids, against strings written out by hand."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.text import chat
from llama_jax.text.chat import LLAMA2, LLAMA3, LLAMA4, ChatML

NAMES = (
    *('<s>', '</s>', '<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|begin_of_text|>'),
    *('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|eom_id|>', '<|end_of_text|>'),
    *('<|header_start|>', '<|header_end|>', '<|eot|>', '<|eom|>'),
)


class Bytes:
    """A vocabulary of bytes; control tokens follow."""

    def __init__(self, names=NAMES):
        self.control = {name: 256 + i for i, name in enumerate(names)}
        self.vocab_size = 256 + len(names)
        self.bos_id, self.eos_id = self.control.get('<s>'), self.control.get('</s>')
        self.pad_id, self.end_ids = self.eos_id, (self.eos_id,)

    def encode(self, text, *, continues=False):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids, *, show_control=False):
        return b''.join(self.token_bytes(i) for i in ids).decode()

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else b''

    def read(self, ids):
        """Control tokens by name among pieces of text."""
        name = {i: name for name, i in self.control.items()}
        groups = itertools.groupby(ids, lambda i: name.get(i, 'text'))
        pieces = [(kind, list(group)) for kind, group in groups]
        return [self.decode(ids) if kind == 'text' else kind for kind, ids in pieces]


VOCABULARY = Bytes()
ASKED = [
    {'role': 'system', 'content': ' Be brief. '},
    {'role': 'user', 'content': ' Hi\n'},
    {'role': 'assistant', 'content': ' Hello. '},
    {'role': 'user', 'content': '你好 🙂'},
]
FORMATS = {'chatml': ChatML(), 'llama2': LLAMA2, 'llama3': LLAMA3, 'llama4': LLAMA4}
formats = pytest.mark.parametrize('format_', FORMATS.values(), ids=FORMATS)


def test_chatml():
    ids = ChatML('You are terse').encode(ASKED, VOCABULARY)
    start, end = '<|im_start|>', '<|im_end|>'
    assert VOCABULARY.read(ids) == [
        *(start, 'system\n Be brief. ', end, '\n', start, 'user\n Hi\n', end, '\n'),
        *(start, 'assistant\n Hello. ', end, '\n', start, 'user\n你好 🙂', end, '\n'),
        *(start, 'assistant\n'),
    ]


def test_chatml_has_a_system_of_its_own_where_none_is_given():
    for default, first in (
        ('You are terse', ['<|im_start|>', 'system\nYou are terse', '<|im_end|>', '\n']),
        (None, []),
    ):
        ids = ChatML(default).encode(ASKED[3:], VOCABULARY)
        assert VOCABULARY.read(ids) == [
            *first,
            *('<|im_start|>', 'user\n你好 🙂', '<|im_end|>', '\n', '<|im_start|>', 'assistant\n'),
        ]
    ids = ChatML('You are terse').encode([{'role': 'system', 'content': ''}, ASKED[3]], VOCABULARY)
    assert VOCABULARY.read(ids)[:3] == ['<|im_start|>', 'system\n', '<|im_end|>']


def test_llama2():
    assert VOCABULARY.read(LLAMA2.encode(ASKED, VOCABULARY)) == [
        '<s>',
        '[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hi [/INST] Hello. ',
        '</s>',
        '<s>',
        '[INST] 你好 🙂 [/INST]',
    ]
    assert VOCABULARY.read(LLAMA2.encode(ASKED[1:2], VOCABULARY)) == ['<s>', '[INST] Hi [/INST]']


@pytest.mark.parametrize(
    ('format_', 'start', 'stop', 'end'),
    [
        (LLAMA3, '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
        (LLAMA4, '<|header_start|>', '<|header_end|>', '<|eot|>'),
    ],
    ids=['llama3', 'llama4'],
)
def test_llama3_and_llama4(format_, start, stop, end):
    assert VOCABULARY.read(format_.encode(ASKED, VOCABULARY)) == [
        '<|begin_of_text|>',
        *(start, 'system', stop, '\n\n Be brief. ', end),
        *(start, 'user', stop, '\n\n Hi\n', end),
        *(start, 'assistant', stop, '\n\n Hello. ', end),
        *(start, 'user', stop, '\n\n你好 🙂', end),
        *(start, 'assistant', stop, '\n\n'),
    ]


SPOKEN = st.lists(st.one_of(st.text(max_size=5), st.sampled_from(NAMES)), max_size=4).map(''.join)


@formats
@hypothesis.settings(deadline=None)
@hypothesis.given(texts=st.lists(SPOKEN, min_size=1, max_size=5))
def test_no_text_adds_a_control_token(format_, texts):
    texts = texts if len(texts) % 2 else texts[1:]
    roles = itertools.cycle(['user', 'assistant'])
    said = [{'role': role, 'content': text} for role, text in zip(roles, texts, strict=False)]
    plain = [{**message, 'content': 'x'} for message in said]

    def control(messages):
        ids = format_.encode(messages, VOCABULARY)
        return [i for i in ids if i in VOCABULARY.control.values()]

    assert control(said) == control(plain)


@formats
@pytest.mark.parametrize(
    ('roles', 'named'),
    [
        ('', 'without messages'),
        ('s', 'end with the user'),
        ('a', 'message 0 is of the assistant, where the user has the turn'),
        ('sa', 'message 1 is of the assistant'),
        ('us', 'message 1 is of the system, where the assistant has the turn'),
        ('ssu', 'message 1 is of the system'),
        ('uu', 'message 1 is of the user'),
        ('ua', 'the last message is of the assistant'),
        ('uaa', 'message 2 is of the assistant'),
        ('ut', "message 1 has the role 'tool'"),
        ('un', 'message 1 has the role None'),
    ],
)
def test_wrong_order_is_refused_by_name(format_, roles, named):
    names = {'s': 'system', 'u': 'user', 'a': 'assistant', 't': 'tool', 'n': None}
    with pytest.raises(UserError) as refused:
        format_.encode([{'role': names[r], 'content': 'x'} for r in roles], VOCABULARY)
    assert named in str(refused.value) and '\n' not in str(refused.value)


@formats
@pytest.mark.parametrize('message', [{'role': 'user'}, {'role': 'user', 'content': ['x']}])
def test_content_that_is_no_text_is_refused(format_, message):
    with pytest.raises(UserError, match=r'message 0 \(user\) has no text'):
        format_.encode([message], VOCABULARY)


@pytest.mark.parametrize('tag', ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'])
@pytest.mark.parametrize('i', range(4))
def test_llama2_refuses_text_with_its_tags(tag, i):
    said = [dict(message) for message in ASKED]
    said[i]['content'] += f'a{tag}b'
    with pytest.raises(UserError) as refused:
        LLAMA2.encode(said, VOCABULARY)
    assert f'{said[i]["role"]} message holds {tag}' in str(refused.value)


@formats
def test_vocabulary_of_another_model_is_refused(format_):
    with pytest.raises(UserError, match='vocabulary'):
        format_.encode(ASKED, Bytes(['<pad>']))


def test_every_id_of_the_end_list_ends_an_answer():
    eos = VOCABULARY.eos_id
    for format_, names in (
        (ChatML(), ['<|im_end|>', '<|endoftext|>']),
        (LLAMA2, []),
        (LLAMA3, ['<|eot_id|>', '<|end_of_text|>', '<|eom_id|>']),
        (LLAMA4, ['<|eot|>', '<|end_of_text|>', '<|eom|>']),
        (None, []),
    ):
        expected = (eos, *(VOCABULARY.control[name] for name in names))
        assert chat.end_ids(format_, VOCABULARY) == expected
    few = Bytes(['</s>', '<|im_end|>'])
    assert chat.end_ids(ChatML(), few) == (256, 257)


def test_templates_are_recognised():
    assert chat.from_template("'<|start_header_id|>' + message['role']") == LLAMA3
    assert chat.from_template("'<|header_start|>' + message['role']") == LLAMA4
    assert chat.from_template("'[INST] ' + '<<SYS>>\\n' + content") == LLAMA2
    assert chat.from_template("'[INST] ' + content") is None  # Mistral's
    assert chat.from_template("'<|user|>' + content") is None
    chatml = "{{'<|im_start|>' + message['role'] + '\\n'}}"
    assert chat.from_template(chatml) == ChatML(None)
    for newline in ('\n', '\\n'):
        template = f"{{{{ '<|im_start|>system{newline}Hi, I am X<|im_end|>{newline}' }}}}{chatml}"
        assert chat.from_template(template) == ChatML('Hi, I am X')

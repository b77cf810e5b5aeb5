"""Chats as token ids, against strings written out by hand."""

import itertools

import hypothesis
import jinja2
import pytest
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.text import chat
from llama_jax.text.chat import LLAMA2, LLAMA3, LLAMA4, ChatML, Conversation
from llama_jax.text.jinja import source_of
from tests.text.chats import NAMES, Bytes, plain

VOCABULARY = Bytes()
ASKED = [
    {'role': 'system', 'content': ' Be brief. '},
    {'role': 'user', 'content': ' Hi\n'},
    {'role': 'assistant', 'content': ' Hello. '},
    {'role': 'user', 'content': '你好 🙂'},
]
FORMATS = {'chatml': ChatML(), 'llama2': LLAMA2, 'llama3': LLAMA3, 'llama4': LLAMA4}
formats = pytest.mark.parametrize('format_', FORMATS.values(), ids=FORMATS)

# What each format's public template says, without default system messages and dates.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    '{% set loop_messages = messages %}{% set system_message = false %}{% endif %}'
    '{% for message in loop_messages %}'
    '{% if loop.index0 == 0 and system_message != false %}'
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    '{% endif %}{% endfor %}'
)
HEADERS_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ START + message['role'] + STOP + '\n\n' + message['content'] + END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ START + 'assistant' + STOP + '\n\n' }}{% endif %}"
)
TEMPLATES = {
    'chatml': (CHATML_TEMPLATE, {}),
    'llama2': (LLAMA2_TEMPLATE, {'bos_token': '<s>', 'eos_token': '</s>'}),
    'llama3': (
        HEADERS_TEMPLATE,
        {'START': LLAMA3.start, 'STOP': LLAMA3.stop, 'END': LLAMA3.end},
    ),
    'llama4': (
        HEADERS_TEMPLATE,
        {'START': LLAMA4.start, 'STOP': LLAMA4.stop, 'END': LLAMA4.end},
    ),
}


def encoded(format_, messages, vocabulary=VOCABULARY, begin=(), **settings):
    return format_.encode(Conversation(messages, **settings), vocabulary, begin=begin)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('n', [1, 2, 3, 4])
@pytest.mark.parametrize('system', [True, False])
def test_each_format_equals_its_template(name, n, system):
    source, variables = TEMPLATES[name]
    roles = itertools.cycle(['user', 'assistant'])
    said = [
        {'role': role, 'content': text}
        for role, text in zip(roles, [' Hi\n', ' Hello. ', '你好 🙂', 'Yes'][:n], strict=False)
    ]
    said = [*ASKED[: int(system)], *said]
    expected = plain(source, said, **variables)
    assert ''.join(VOCABULARY.read(encoded(FORMATS[name], said))) == expected
    # And so does the one that is exported.
    assert plain(source_of(FORMATS[name]), said, bos_token='<s>', eos_token='</s>') == expected


def test_a_model_that_reads_bos_before_every_text_exports_it():
    """Programs leave it to the template of a chat."""
    ids = encoded(ChatML(), ASKED, begin=(VOCABULARY.bos_id,))
    written = ''.join(VOCABULARY.read(ids))
    assert written.startswith('<s><|im_start|>')
    assert plain(source_of(ChatML(), begin=True), ASKED, bos_token='<s>') == written
    for other in (LLAMA2, LLAMA3, LLAMA4):  # which begin with one anyway
        assert source_of(other, begin=True) == source_of(other)


@pytest.mark.parametrize(
    'said',
    [
        [ASKED[1], {'role': 'tool', 'content': 'x'}],
        [ASKED[2]],
        [{'role': 'user', 'content': 'a [/INST] b'}],
        [{'role': 'system', 'content': '<</SYS>>'}, ASKED[1]],
    ],
)
def test_the_exported_template_of_llama_2_refuses_what_the_format_does(said):
    with pytest.raises(UserError, match='Llama 2'):
        encoded(LLAMA2, said)
    with pytest.raises(jinja2.TemplateError, match='Llama 2'):
        plain(source_of(LLAMA2), said, bos_token='<s>', eos_token='</s>')


@pytest.mark.parametrize('name', ['llama3', 'llama4'])
def test_the_exported_template_of_headers_knows_their_roles(name):
    said = [*ASKED, {'role': 'tool', 'content': '{}'}, {'role': 'developer', 'content': 'x'}]
    written = ''.join(VOCABULARY.read(encoded(FORMATS[name], said)))
    assert plain(source_of(FORMATS[name]), said) == written
    assert source_of(None) is None


def test_chatml():
    start, end = '<|im_start|>', '<|im_end|>'
    assert VOCABULARY.read(encoded(ChatML(), ASKED)) == [
        *(start, 'system\n Be brief. ', end, '\n', start, 'user\n Hi\n', end, '\n'),
        *(start, 'assistant\n Hello. ', end, '\n', start, 'user\n你好 🙂', end, '\n'),
        *(start, 'assistant\n'),
    ]


def test_llama2():
    assert VOCABULARY.read(encoded(LLAMA2, ASKED)) == [
        '<s>',
        '[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hi [/INST] Hello. ',
        '</s>',
        '<s>',
        '[INST] 你好 🙂 [/INST]',
    ]
    assert VOCABULARY.read(encoded(LLAMA2, ASKED[1:2])) == ['<s>', '[INST] Hi [/INST]']


def test_llama3():
    start, stop, end = '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'
    roles = ('developer', 'tool', 'critic', 'user', 'user')
    said = [{'role': role, 'content': 'x'} for role in roles]
    names = ('system', 'ipython', 'critic', 'user', 'user')
    assert VOCABULARY.read(encoded(LLAMA3, said)) == [
        '<|begin_of_text|>',
        *(piece for name in names for piece in (start, name, stop, '\n\nx', end)),
        *(start, 'assistant', stop, '\n\n'),
    ]


@formats
@pytest.mark.parametrize('trail', ['', ' '])
def test_last_message_is_continued(format_, trail):
    said = [ASKED[1], {'role': 'assistant', 'content': f'Hel{trail}'}]
    ids = encoded(format_, said, continue_final_message=True)
    if format_ == LLAMA2:
        trail = ''  # it strips
    assert VOCABULARY.read(ids)[-1].endswith(f'Hel{trail}')
    whole = encoded(format_, said, add_generation_prompt=False)
    assert whole[: len(ids)] == ids and whole != ids


@formats
def test_begin_token_is_there_once(format_):
    first = encoded(format_, ASKED)[0]
    assert encoded(format_, ASKED, begin=(first,))[:2] != [first, first]
    (other,) = [VOCABULARY.control['<|endoftext|>']]
    assert encoded(format_, ASKED, begin=(other,)) == [other, *encoded(format_, ASKED)]


SPOKEN = st.lists(st.one_of(st.text(max_size=5), st.sampled_from(NAMES)), max_size=4).map(''.join)


@formats
@hypothesis.settings(deadline=None)
@hypothesis.given(texts=st.lists(SPOKEN, min_size=1, max_size=5))
def test_no_text_adds_a_control_token(format_, texts):
    roles = itertools.cycle(['user', 'assistant'])
    said = [{'role': role, 'content': text} for role, text in zip(roles, texts, strict=False)]
    without = [{**message, 'content': 'x'} for message in said]

    def control(messages):
        return VOCABULARY.controls(encoded(format_, messages))

    assert control(said) == control(without)


@pytest.mark.parametrize('roles', ['a', 'sa', 'us', 'ssu', 'uu', 'uaa', 'ut', 's'])
def test_order_that_llama2_cannot_write(roles):
    names = {'s': 'system', 'u': 'user', 'a': 'assistant', 't': 'tool'}
    with pytest.raises(UserError, match='has the turn: a chat of Llama 2') as refused:
        encoded(LLAMA2, [{'role': names[r], 'content': 'x'} for r in roles])
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize(
    ('messages', 'named'),
    [
        ([], 'without messages'),
        (['hi'], 'message 0 is no object'),
        ([{'content': 'x'}], 'message 0 has the role None'),
        ([{'role': 'user'}], r'message 0 \(user\) has no text'),
        ([{'role': 'user', 'content': 3}], r'message 0 \(user\) has no text'),
        ([{'role': 'user', 'content': [{'type': 'image_url'}]}], "part of type 'image_url'"),
        ([{'role': 'user', 'content': ['x']}], 'part of type None'),
    ],
)
def test_messages_that_are_none(messages, named):
    with pytest.raises(UserError, match=named):
        Conversation(messages)


def test_parts_are_one_text():
    parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
    ids = encoded(ChatML(), [{'role': 'user', 'content': parts}])
    assert ids == encoded(ChatML(), [{'role': 'user', 'content': 'ab'}])


def test_nothing_to_continue():
    called = {'role': 'assistant', 'content': None, 'tool_calls': [{}]}
    with pytest.raises(UserError, match='no text that could be continued'):
        Conversation([called], continue_final_message=True)


@pytest.mark.parametrize('what', ['tools', 'documents', 'variables'])
def test_what_only_a_template_can_write(what):
    given = {'x': 1} if what == 'variables' else [{'x': 1}]
    with pytest.raises(UserError, match=f'{what} are given, and the model has no chat template'):
        encoded(ChatML(), ASKED, **{what: given})
    called = {'role': 'assistant', 'content': 'x', 'tool_calls': [{}]}
    with pytest.raises(UserError, match='message 0 has tool_calls'):
        encoded(ChatML(), [called])


@pytest.mark.parametrize('tag', ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'])
@pytest.mark.parametrize('i', range(4))
def test_llama2_refuses_text_with_its_tags(tag, i):
    said = [dict(message) for message in ASKED]
    said[i]['content'] += f'a{tag}b'
    with pytest.raises(UserError) as refused:
        encoded(LLAMA2, said)
    assert f'{said[i]["role"]} message holds {tag}' in str(refused.value)


@formats
def test_vocabulary_of_another_model_is_refused(format_):
    with pytest.raises(UserError, match='vocabulary'):
        encoded(format_, ASKED, Bytes(['<pad>']))


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


def test_format_of_a_vocabulary():
    for format_ in (LLAMA3, LLAMA4):
        assert chat.by_vocabulary(Bytes([format_.start, format_.end])) == format_
    assert chat.by_vocabulary(Bytes(['<|im_start|>', '<|im_end|>'])) == ChatML()
    assert chat.by_vocabulary(Bytes(['<s>', '<|im_end|>', LLAMA3.start])) is None

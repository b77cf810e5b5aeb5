"""Which tokens of a chat are an answer: between the prompt that asks for it and the end of turn."""

import itertools
import random

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.text.chat import FORMATS, Conversation
from llama_jax.text.special import Special
from llama_jax.text.template import Template
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.turns import alike
from tests.text.chats import NAMES, Bytes

OTHERS = (
    *('<|observation|>', '<|assistant|>', '<start_of_turn>', '<end_of_turn>', '<|end|>'),
    *('<think>', '</think>', '<|END_RESPONSE|>', '<|END_OF_TURN_TOKEN|>', '[TOOL_CALLS]'),
)
VOCABULARY = Bytes((*NAMES, *OTHERS))
TOKENS = {'bos_token': '<s>', 'eos_token': '</s>'}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<tool_response>\n' + m.content +"
    " '\n</tool_response><|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' +"
    ' m.content }}{% for c in m.tool_calls %}{{ \'<tool_call>\n{"name": "\' + c.function.name +'
    ' \'", "arguments": \' + c.function.arguments | tojson + "}\n</tool_call>" }}{% endfor %}'
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)
# The ways in which real templates write turns, each with a first [and a later] answer as learnt.
WAYS = {
    'chatml': (CHATML, 'A1<|im_end|>', 'A2<|im_end|>'),
    'trimmed (Gemma)': (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' +"
        " m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}",
        'A1<end_of_turn>',
        'A2<end_of_turn>',
    ),
    'no header (Mistral)': (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + m.content +"
        " ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        ' A1</s>',
        ' A2</s>',
    ),
    'ended by the next header (GLM)': (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        '\nA1<|user|>',
        '\nA2</s>',
    ),
    'ended at the end of the text alone (Falcon)': (
        "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}",
        ' A1',
        ' A2</s>',
    ),
    'white space behind an open end (Solar)': (
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
        'A1',
        'A2\n\n</s>',
    ),
    'thoughts in the last turn only (Qwen3)': (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        'A1<|im_end|>',
        '<think>\n\n</think>\n\nA2<|im_end|>',
    ),
    'a prompt that begins the answer (DeepSeek-R1)': (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
        'A1</s>',
        'A2</s>',
    ),
    'other white space in the prompt': (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content + '<|im_end|>' +"
        " '\n\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}",
        '\nA1<|im_end|>',
        '\nA2<|im_end|>',
    ),
    'two tokens at the end (Command R7B)': (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content +"
        " '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        'A1<|END_RESPONSE|><|END_OF_TURN_TOKEN|>',
        'A2<|END_RESPONSE|><|END_OF_TURN_TOKEN|>',
    ),
    'eos behind all (Phi-3)': (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
        'A1<|end|>',
        'A2<|end|>',
    ),
    'a default system text': (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nA1<|im_end|>\n' }}{% endif %}"
        + CHATML,
        'A1<|im_end|>',
        'A2<|im_end|>',
    ),
}
SAID = [
    {'role': 'user', 'content': 'A1 <|im_end|>'},
    {'role': 'assistant', 'content': 'A1'},
    {'role': 'user', 'content': ' U2\n'},
    {'role': 'assistant', 'content': 'A2'},
]
VOCABULARY.end_ids = tuple(VOCABULARY.control[name] for name in ('</s>', '<|END_OF_TURN_TOKEN|>'))
GLM = Bytes((*NAMES, *OTHERS))
GLM.end_ids = (GLM.eos_id, GLM.control['<|user|>'])


def turns(format_, messages, learnt=None, vocabulary=VOCABULARY, begin=(), **settings):
    if learnt is None:
        learnt = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
    conversation = Conversation(messages, **settings)
    found = format_.turns(conversation, vocabulary, learnt=learnt, begin=begin)
    assert found.ids.dtype == found.message.dtype == np.int32
    ids = format_.encode(
        Conversation(messages, add_generation_prompt=False, **settings), vocabulary, begin=begin
    )
    end = [] if len(found.ids) == len(ids) else [vocabulary.eos_id]
    assert found.ids.tolist() == [*ids, *end]  # those of `encode`, whatever is learnt
    return found


def read(found, i, vocabulary=VOCABULARY):
    """The text of turn i, which is one piece."""
    (places,) = np.nonzero(found.message == i)
    assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
    return ''.join(vocabulary.read(found.ids[places].tolist()))


@pytest.mark.parametrize('way', WAYS)
def test_a_turn_is_what_the_model_writes_and_its_end(way):
    source, *expected = WAYS[way]
    for system in ([], [{'role': 'system', 'content': 'S'}]):
        messages = [*system, *SAID]
        vocabulary = GLM if 'GLM' in way else VOCABULARY
        found = turns(Template(source, TOKENS), messages, vocabulary=vocabulary)
        learnt = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
        assert [read(found, i) for i in learnt] == expected
        assert set(found.message.tolist()) == {-1, *learnt}


@pytest.mark.parametrize('way', WAYS)
def test_a_turn_begins_where_its_prompt_ends(way):
    """Against the prompts themselves, wherever the chat begins with them."""
    template = Template(WAYS[way][0], TOKENS)
    chance = random.Random(way)
    equal = 0
    for _ in range(20):
        messages = [{'role': 'system', 'content': 'S'}] if chance.random() < 0.3 else []
        for _ in range(chance.randint(1, 3)):
            user = chance.choice(['Hi', ' Hi\n', '', '你好', 'A1'])
            answer = chance.choice(['Yes', '\n No. ', '好', '{"a": 1}', 'A1'])
            messages += [{'role': 'user', 'content': user}]
            messages += [{'role': 'assistant', 'content': answer}]
        found = turns(template, messages)
        for i, message in enumerate(messages):
            if message['role'] != 'assistant':
                continue
            prompt = template.encode(Conversation(messages[:i]), VOCABULARY)
            if found.ids.tolist()[: len(prompt)] == prompt:
                assert found.message.tolist().index(i) == len(prompt)
                equal += 1
    # These write no chat as they write its prompts.
    assert equal >= 20 or any(name in way for name in ('Qwen3', 'DeepSeek-R1', 'other white'))


CALL = {'function': {'name': 'weather', 'arguments': {'city': 'Köln', 'n': 3}}}


def test_calls_of_tools_are_learnt_and_their_results_are_not():
    messages = [
        SAID[0],
        {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
        {'role': 'tool', 'content': '3'},
        {'role': 'assistant', 'content': 'A2'},
    ]
    found = turns(Template(CALLS, TOKENS), messages)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "n": 3}}\n</tool_call>'
    # The prompt ends with <think>, which is no beginning of <tool_call>.
    assert read(found, 1) == call + '<|im_end|>'
    assert read(found, 3) == 'A2<|im_end|>'


def test_a_turn_ends_at_the_token_that_ends_it():
    """What the template writes of the assistant's words behind it is not its turn (gpt-oss)."""
    source = CHATML.replace('m.content +', "m.content + '<|im_end|>' + (m.name or '') +")
    messages = [
        {'role': 'user', 'content': 'U', 'name': 'x'},
        {'role': 'assistant', 'content': 'A', 'name': 'f'},
    ]
    assert read(turns(Template(source, TOKENS), messages), 1) == 'A<|im_end|>'


@pytest.mark.parametrize('name', FORMATS)
def test_formats_of_the_house(name):
    ends = {'chatml': '<|im_end|>', 'llama2': ' </s>', 'llama3': '<|eot_id|>', 'llama4': '<|eot|>'}
    messages = [{'role': 'system', 'content': 'A1'}, {**SAID[0], 'content': 'A1'}, *SAID[1:]]
    begin = (VOCABULARY.bos_id,)
    for said in (messages, messages[1:]):
        found = turns(FORMATS[name], said, begin=begin)
        first = len(said) - 3
        assert [read(found, i) for i in (first, first + 2)] == [f'A{k}{ends[name]}' for k in (1, 2)]


def test_messages_of_others_may_be_learnt_and_of_the_assistant_not():
    found = turns(FORMATS['chatml'], SAID, learnt=[2, 3])
    assert read(found, 2) == ' U2\n<|im_end|>' and read(found, 3) == 'A2<|im_end|>'
    assert set(found.message.tolist()) == {-1, 2, 3}


def test_eos_follows_the_last_message_alone():
    """Not an earlier one that is learnt while the last is not."""
    template = Template(WAYS['ended at the end of the text alone (Falcon)'][0], TOKENS)
    found = turns(template, SAID, learnt=[1])
    assert found.ids[-1] != VOCABULARY.eos_id and read(found, 1) == ' A1'


REFUSED = [
    (CHATML, [SAID[0], {'role': 'assistant', 'content': ''}], 'nothing of message 1'),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", SAID, 'message 1'),
    (
        CHATML.replace('m.content', "m.content.split('</think>')[-1]"),
        [SAID[0], {'role': 'assistant', 'content': '<think>\nhm\n</think>\n\nA'}],
        'a part of message 1, such as its reasoning',
    ),
    (CHATML, [SAID[0], {**SAID[1], 'reasoning_content': 'hm'}], 'a part of message 1'),
    (CHATML, [SAID[0], {**SAID[1], 'tool_calls': [CALL]}], 'a part of message 1'),
    (
        '{{ messages[1].content[0] }}{{ messages[0].content }}{{ messages[1].content[1:] }}',
        SAID[:2],
        'other messages within message 1',
    ),
    ("{{ raise_exception('no') }}", SAID, 'refuses: no'),
]


@pytest.mark.parametrize(('source', 'messages', 'said'), REFUSED)
def test_what_cannot_be_learnt_as_it_is_is_refused(source, messages, said):
    with pytest.raises(UserError, match=said):
        Template(source, TOKENS).turns(Conversation(messages), VOCABULARY, learnt=[1])


def test_thoughts_that_the_template_writes_are_learnt():
    source = CHATML.replace(
        'm.content',
        "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content",
    )
    messages = [SAID[0], {**SAID[1], 'reasoning_content': ' hm '}]
    assert read(turns(Template(source, TOKENS), messages), 1) == ('<think> hm </think>A1<|im_end|>')
    # Of a message that is not learnt the template may drop what it likes.
    messages = [*messages, *SAID[2:]]
    assert read(turns(Template(CHATML, TOKENS), messages, learnt=[3]), 3) == 'A2<|im_end|>'


def tokenizer(normalizer=None, prefix=None):
    """Characters, and some pairs of them; spaces as SentencePiece has them where there is a
    prefix."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    space = '\u2581' if prefix else ' '
    letters = [*map(chr, range(33, 127)), '\n', space, 'é', '<unk>']
    pairs = [('\n', 'A'), (':', space), (space, 'A'), ('o', '\n')]
    words = {piece: i for i, piece in enumerate([*letters, *(a + b for a, b in pairs)])}
    theirs = Tokenizer(models.BPE(words, pairs, unk_token='<unk>'))
    if prefix:
        theirs.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme='first', split=False)
        theirs.decoder = decoders.Metaspace(space, prepend_scheme='first')
    if normalizer:
        theirs.normalizer = normalizers.NFC()
    special = [AddedToken(name, normalized=False, special=True) for name in ('<s>', '</s>')]
    theirs.add_special_tokens(special)
    eos = theirs.token_to_id('</s>')
    return JsonTokenizer(theirs.to_str().encode(), Special(bos_id=eos - 1, eos_id=eos))


PLAIN = (
    "{% for m in messages %}{{ m.role + HEAD + m.content }}{{ eos_token if m.role != 'user' }}"
    "{% endfor %}{{ 'assistant' + HEAD if add_generation_prompt }}"
)


@pytest.mark.parametrize('settings', [{}, {'prefix': True}, {'normalizer': True}], ids=str)
@pytest.mark.parametrize(
    ('head', 'answer', 'expected'),
    [
        (':', 'Ab', ['A', 'b']),
        (':', ' Ab', [': ', 'A', 'b']),  # a token across the border is learnt
        ('\n', 'Ab', ['\nA', 'b']),
        ('\n', 'b', ['b']),
    ],
)
def test_tokens_across_the_border_are_in_the_turn(head, answer, expected, settings):
    """With the bytes of tokens, or where the vocabulary changes its text by prefixes."""
    vocabulary = tokenizer(**settings)
    user = {'role': 'user', 'content': 'e\u0301 o' if settings.get('normalizer') else 'o o'}
    messages = [user, {'role': 'assistant', 'content': answer}]
    template = Template(PLAIN.replace('HEAD', repr(head)), TOKENS)
    found = turns(template, messages, vocabulary=vocabulary)
    learnt = found.ids[found.message == 1].tolist()
    assert learnt[-1] == vocabulary.eos_id
    pieces = [vocabulary.to_bytes(np.array([i])).decode() for i in learnt[:-1]]
    assert pieces == expected
    assert np.array_equal(
        np.flatnonzero(found.message == 1), len(found.ids) - 1 - np.arange(len(learnt))[::-1]
    )


def test_characters_of_one_to_four_bytes_before_a_turn():
    """And in it, where all of a chat is one text."""
    letters = '\x7f\x80\u07ff\u0800\uffff\U00010000🙂'
    template = Template(WAYS['ended at the end of the text alone (Falcon)'][0], TOKENS)
    messages = [{**one, 'content': f'{letters}{i}{letters}'} for i, one in enumerate(SAID)]
    found = turns(template, messages)
    assert [read(found, i) for i in (1, 3)] == [
        f' {letters}1{letters}',
        f' {letters}3{letters}</s>',
    ]


def test_alike():
    assert alike('a b', 'a  b c') == 4 and alike('a  b', 'ab') == 2
    assert alike('<x>\n<think>', '<x>\n<tool>') == 4 and alike('x', 'y') == 0
    assert alike('name: ', 'nameless') == 0 and alike('', 'x') == 0
    for a, b in itertools.product(['', 'x', 'x\n'], repeat=2):
        assert alike(a, b) <= len(b)

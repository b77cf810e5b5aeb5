"""Rows of real data sets, in the shapes that people publish them."""

import json

import pytest

from llama_jax.data.record import (
    BadRecordError,
    Chat,
    Labelled,
    Pair,
    Problem,
    Text,
)
from llama_jax.data.schemas import NAMES, record_of


def said(role, content, **more):
    return {'role': role, 'content': content, **more}


def user(text):
    return said('user', text)


def assistant(text):
    return said('assistant', text)


def share(role, text):
    return {'from': role, 'value': text}


ASKED = [user('q'), assistant('a')]
CALL = {'name': 'area', 'arguments': {'width': 3, 'height': 2}}
CALLED = {'type': 'function', 'function': CALL}
TOOL = {'name': 'area', 'description': 'Area', 'parameters': {'type': 'object'}}

CHATS = {
    'OpenAI': (dict(messages=ASKED), ASKED),
    'OpenAI, weights': (
        dict(messages=[user('q'), said('assistant', 'a', weight=0), user('r'), assistant('b')]),
        [*ASKED, user('r'), assistant('b')],
    ),
    'UltraChat 200k': (dict(prompt='q', prompt_id='1', messages=ASKED), ASKED),
    'UltraChat': (dict(id='0', data=['q', 'a', 'r', 'b']), [*ASKED, user('r'), assistant('b')]),
    'ShareGPT': (dict(id='x', conversations=[share('human', 'q'), share('gpt', 'a')]), ASKED),
    'ShareGPT, system': (
        dict(system='s', conversations=[share('human', 'q'), share('gpt', 'a')], tools='[]'),
        [said('system', 's'), *ASKED],
    ),
    'OpenAssistant': (dict(messages=[said('prompter', 'q'), assistant('a')]), ASKED),
    'Alpaca': (dict(instruction='q', input='', output='a', text='### ...'), ASKED),
    'Alpaca, input': (dict(instruction='q', input='i', output='a'), [user('q\ni'), assistant('a')]),
    'BELLE': (dict(instruction='问', input='', output='答'), [user('问'), assistant('答')]),
    'Firefly': (dict(kind='NLI', input='问', target='答'), [user('问'), assistant('答')]),
    'MOSS': (dict(conversation=[dict(human='q', assistant='a')], category='Code'), ASKED),
    'Dolly': (
        dict(instruction='q', context='c', response='a', category='qa'),
        [user('q\nc'), assistant('a')],
    ),
    'OpenOrca': (
        dict(id='1', system_prompt='s', question='q', response='a'),
        [said('system', 's'), *ASKED],
    ),
    'OpenOrca, no system': (dict(system_prompt='', question='q', response='a'), ASKED),
    'LLaMA-Factory, history': (
        dict(instruction='r', input='', output='b', history=[['q', 'a']]),
        [*ASKED, user('r'), assistant('b')],
    ),
    'GSM8K': (dict(question='q', answer='a'), ASKED),
    'prompt and completion': (dict(prompt='q', completion='a'), ASKED),
    'nulls of columns': (dict(messages=ASKED, prompt=None, tools=None, system=None), ASKED),
    "nulls of OpenAI's answers": (
        dict(messages=[user('q'), said('assistant', 'a', function_call=None, tool_calls=None)]),
        ASKED,
    ),
    'nulls of two formats': (
        dict(messages=[{**share('human', 'q'), **said(None, None)}, assistant('a')]),
        ASKED,
    ),
    'parts of type text': (
        dict(messages=[said('user', [dict(type='text', text='q')]), assistant('a')]),
        ASKED,
    ),
    'developer': (dict(messages=[said('developer', 's'), *ASKED]), [said('system', 's'), *ASKED]),
}


@pytest.mark.parametrize('name', CHATS)
def test_chats(name):
    fields, wanted = CHATS[name]
    chat = record_of(fields, Chat)
    assert list(chat.messages) == wanted and chat.tools == ()
    if 'weights' in name:
        assert chat.weights == (0, 0, 0, 1)
    else:
        assert chat.weights == tuple(float(one['role'] == 'assistant') for one in wanted)


def test_weights_and_flags():
    messages = [said('user', 'q', train=True), said('assistant', 'a', train=False), user('r')]
    chat = record_of(dict(messages=[*messages, said('assistant', 'b', weight=0.5)]), Chat)
    assert chat.weights == (1, 0, 0, 0.5)
    # Of a prompt that is given apart, an answer is no answer to be learnt.
    chat = record_of(dict(prompt=[*ASKED, user('r')], completion=[assistant('b')]), Chat)
    assert chat.weights == (0, 0, 0, 1)


@pytest.mark.parametrize(
    'fields',
    [
        dict(
            messages=[
                user('q'),
                said('assistant', None, tool_calls=[dict(id='c', type='function', function=CALL)]),
                said('tool', '6', tool_call_id='c'),
                assistant('a'),
            ],
            tools=[dict(type='function', function=TOOL)],
        ),
        dict(
            messages=[
                user('q'),
                said(
                    'assistant',
                    '',
                    tool_calls=[dict(function=dict(CALL, arguments=json.dumps(CALL['arguments'])))],
                ),
                said('tool', '6'),
                assistant('a'),
            ],
            functions=[TOOL],
        ),
        dict(
            conversations=[
                share('human', 'q'),
                share('function_call', json.dumps(CALL)),
                share('observation', '6'),
                share('gpt', 'a'),
            ],
            tools=json.dumps([TOOL]),
        ),
        dict(
            messages=[
                user('q'),
                said('assistant', None, function_call=CALL),
                said('function', '6', name='area'),
                assistant('a'),
            ],
            functions=[TOOL],
        ),
    ],
    ids=['OpenAI', 'arguments as JSON', 'Glaive', 'older OpenAI'],
)
def test_calls_of_tools(fields):
    chat = record_of(fields, Chat)
    assert [one['role'] for one in chat.messages] == ['user', 'assistant', 'tool', 'assistant']
    (call,) = chat.messages[1]['tool_calls']
    assert call['function'] == CALL and call['type'] == 'function'
    assert list(call['function']['arguments']) == ['width', 'height']  # in their order
    assert chat.weights == (0, 1, 0, 1) and chat.tools == (dict(type='function', function=TOOL),)


def test_parts_of_messages_by_their_kinds():
    parts = [
        dict(type='reasoning', value='hm'),
        dict(type='text', value='a'),
        dict(type='tool_call', value=json.dumps(CALL)),
    ]
    messages = [
        said('user', [dict(type='text', value='q')], loss_weight=0.0),
        said('assistant', parts, loss_weight=0.5),
        said('tool', '6'),
        assistant('b'),
    ]
    chat = record_of(dict(messages=messages), Chat)
    assert chat.messages[1] == {**A, 'reasoning_content': 'hm', 'tool_calls': [CALLED]}
    assert chat.weights == (0, 0.5, 0, 1)


@pytest.mark.parametrize('kind', [Chat, Pair, Problem])
def test_what_is_more_than_text_or_not_to_be_learnt_is_refused(kind):
    fields = dict(prompt='q', completion='a', answer='a')
    record_of(dict(fields, images=[], label=True), kind)
    with pytest.raises(BadRecordError, match='images are given, and only text is read'):
        record_of(dict(fields, images=['1.jpg']), kind)
    with pytest.raises(BadRecordError, match='label is false'):
        record_of(dict(fields, label=False), kind)
    assert record_of(dict(text='t', label=False), Labelled).label == 'false'


BAD_CHATS = {
    'ends with the user': ([user('q'), assistant('a'), user('r')], 'ends with the user'),
    'ends with a tool': ([*ASKED, said('tool', '1')], 'ends with the tool'),
    'nobody answers': ([user('q')], 'no message of the assistant'),
    'assistant first': ([assistant('a'), user('q'), assistant('b')], r'messages\[0\] is of the a'),
    'after the system': ([said('system', 's'), *ASKED[1:]], r'messages\[1\] is of the assistant'),
    'a tool is not asked': ([user('q'), said('tool', '1'), assistant('a')], r'\[1\] is of a tool'),
    'empty answer': ([user('q'), assistant(' \n')], r'messages\[1\].content is empty'),
    'empty question': ([user(''), assistant('a')], r'messages\[0\].content is empty'),
    'no content': ([user('q'), dict(role='assistant')], r'messages\[1\].content is missing'),
    'a picture': (
        [said('user', [dict(type='image_url')]), assistant('a')],
        'part of type image_url',
    ),
    'no type': ([said('user', [dict(type=['text'], text='q')]), *ASKED], "of type .'text'., and"),
    'no role': ([dict(content='q'), assistant('a')], r'messages\[0\] has no role'),
    'a number': ([user('q'), said('assistant', 4)], r'messages\[1\].content is no text'),
    'no weight': ([user('q'), said('assistant', 'a', weight=-1)], 'weight is -1'),
    'too large': ([user('q'), said('assistant', 'a', weight=10**400)], 'must be a number of 0 or'),
    'nothing to learn': ([user('q'), said('assistant', 'a', weight=0)], 'all weights are 0'),
    'no messages': ([], 'messages is empty'),
    'no message': ([1, 2], r'messages\[0\] is no message'),
    'a call without JSON': (
        [user('q'), said('function_call', 'area(3)'), said('tool', '1'), assistant('a')],
        r'messages\[1\].content is no JSON',
    ),
    'a call without a name': (
        [user('q'), said('assistant', None, tool_calls=[{'function': {}}]), *ASKED],
        r'tool_calls\[0\] is no call',
    ),
    'a number for a name': (
        [user('q'), said('assistant', None, tool_calls=[{'name': 3}]), *ASKED],
        r'tool_calls\[0\] is no call',
    ),
}


@pytest.mark.parametrize('name', BAD_CHATS)
def test_chats_that_nothing_can_be_learnt_from(name):
    messages, problem = BAD_CHATS[name]
    with pytest.raises(BadRecordError, match=problem):
        record_of(dict(messages=messages), Chat)


@pytest.mark.parametrize('tools', [[1], {'name': 'f'}, '"f"'], ids=str)
def test_tools_that_are_no_list_of_objects(tools):
    with pytest.raises(BadRecordError, match='tools is no list of objects'):
        record_of(dict(messages=ASKED, tools=tools), Chat)


def test_pairs():
    for fields in (
        dict(source='q', target='a'),
        dict(prompt='q', completion='a'),
        dict(kind='x', input='q', target='a'),
        dict(instruction='q', input='', output='a'),
        # A data set's name in `source` is no source.
        dict(source='flan', prompt='q', completion='a'),
    ):
        assert record_of(fields, Pair) == Pair('q', 'a')
    assert record_of(dict(instruction='q', input='i', output='a'), Pair).source == 'q\ni'
    for fields, problem in (
        (dict(source='q', target=''), 'target is empty'),
        (dict(source='q'), r'there: source; needed: prompt and completion; instruction and'),
        (dict(prompt=ASKED[:1], completion=ASKED[1:]), 'prompt holds messages'),
        (dict(source=1, target='a'), 'source is no text'),
    ):
        with pytest.raises(BadRecordError, match=problem):
            record_of(fields, Pair)


Q, A, B = user('q'), assistant('a'), assistant('b')


def test_problems():
    gsm8k = record_of(dict(question='q', answer='48/2 = 24\n#### 1,024'), Problem)
    assert gsm8k == Problem((Q,), '1,024', {'answer': '48/2 = 24\n#### 1,024'})
    assert record_of(dict(prompt='1+1=', answer=2, level=3), Problem) == Problem(
        '1+1=', '2', {'level': 3}
    )
    verl = dict(data_source='d', prompt=[Q], reward_model=dict(style='rule', ground_truth='7'))
    found = record_of(verl, Problem)
    assert (found.prompt, found.answer) == ((Q,), '7')
    assert found.fields == {key: verl[key] for key in ('data_source', 'reward_model')}
    maths = record_of(dict(source='aops', problem='q', solution='s', messages=[Q, A]), Problem)
    assert (maths.prompt, maths.answer) == ((Q,), 's')
    assert record_of(dict(system='s', prompt='q', answer=''), Problem).prompt[0]['role'] == 'system'
    for fields, problem in (
        (dict(prompt='q'), 'answer is missing .there: prompt.: give ""'),
        (dict(answer='q'), 'no prompt'),
        (dict(prompt=[Q, A], answer='q'), 'ends with the assistant'),
        (dict(prompt='q', answer=['a']), 'answer is list'),
        (dict(prompt=' ', answer='a'), 'prompt is empty'),
    ):
        with pytest.raises(BadRecordError, match=problem):
            record_of(fields, Problem)


def test_labels():
    for fields, wanted in (
        (dict(text='t', label='pos'), ('t', 'pos')),
        (dict(text='t', label=1, label_text='pos'), ('t', 'pos')),
        (dict(text='t', label=-1), ('t', '-1')),
        (dict(text='t', label=2.0), ('t', '2')),
        (dict(text='t', label=True), ('t', 'true')),
        (dict(sentence='t', label=0, idx=5), ('t', '0')),
        (dict(text='t', text_pair='u', label='x'), ('t', 'x', 'u')),
        (dict(premise='t', hypothesis='u', label='x'), ('t', 'x', 'u')),
        (dict(sentence1='t', sentence2='u', label='x', idx=1), ('t', 'x', 'u')),
        (dict(question='t', sentence='u', label='x'), ('t', 'x', 'u')),
    ):
        assert record_of(fields, Labelled) == Labelled(*wanted)
    for fields, problem in (
        (dict(text='t'), 'label is missing .there: text'),
        (dict(text='t', label=None), 'label is missing'),
        (dict(text='t', label=''), 'label is empty'),
        (dict(text='t', label=0.5), 'label is 0.5: give the name'),
        (dict(text='', label=1), 'text is empty'),
        (dict(review='t', label=1), 'no text with a label .there: review, label'),
    ):
        with pytest.raises(BadRecordError, match=problem):
            record_of(fields, Labelled)


def test_every_type_has_a_reader_and_a_name():
    assert record_of(dict(text='t'), Text) == Text('t')
    for kind in NAMES:
        with pytest.raises(BadRecordError):
            record_of({}, kind)

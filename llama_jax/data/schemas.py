"""Records as people's files have them, made those that objectives read.

`record_of` tells by the names of fields what a record is. Where a file has other names,
`Source.rename` maps them. What cannot be learnt from is refused with the reason.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from llama_jax.data.messages import (
    Weighted,
    assistant,
    check_order,
    messages_of,
    tools_of,
    user,
    weights_of,
)
from llama_jax.data.passages import query_passages
from llama_jax.data.record import (
    BadRecordError,
    Chat,
    Labelled,
    Pair,
    Preference,
    Problem,
    Prompt,
    QueryPassages,
    Record,
    Text,
)

Kind = TypeVar('Kind', bound=Record)
Fields = Mapping[str, Any]

VERSION = 3
"""Of what records are made of the fields of files."""
NAMES: dict[type[Record], str] = {
    Text: 'texts',
    Labelled: 'texts with labels',
    Pair: 'pairs of source and target',
    Chat: 'chats',
    Preference: 'preferences',
    Problem: 'problems with answers',
    QueryPassages: 'queries with passages',
}
_MESSAGES = ('messages', 'conversations', 'conversation', 'data')
_SYSTEM = ('system', 'system_prompt')
_ASKED = {
    'source': ('target',),
    'instruction': ('output', 'response', 'completion', 'answer'),
    'prompt': ('completion', 'response', 'output', 'answer'),
    'question': ('answer', 'response'),
    'query': ('response', 'answer'),
    'problem': ('solution', 'answer'),
    'input': ('target', 'output'),
}
"""What is asked, and the names of what answers it."""
_PROMPTS = ('prompt', 'instruction', 'question', 'query', 'problem', 'input')
"""What is asked, where answers are not told by their names. `prompt` is text as it stands; the
others are what a user says."""
_INPUTS = ('input', 'context')
"""What an instruction is about."""
_ANSWERS = ('answer', 'ground_truth', 'solution')
_TEXTS = (
    *(('text', 'text_pair'), ('premise', 'hypothesis'), ('sentence1', 'sentence2')),
    *(('question1', 'question2'), ('text1', 'text2'), ('question', 'sentence')),
    *(('text', None), ('sentence', None), ('content', None)),
)
_LABELS = ('label_text', 'label')
_OTHERS = ('images', 'image', 'videos', 'video', 'audios', 'audio')
"""Fields of what a text only mentions."""
_FINAL = re.compile(r'\n#### (.+)\s*\Z')  # of GSM8K, behind the way to it
_TURNS = re.compile(r'(?:\A|\n\n)(Human|Assistant):')  # of HH-RLHF


def record_of(fields: Fields, kind: type[Kind]) -> Kind:
    """The record of type `kind` that a JSON object or a row of columns holds.

    Fields that are null count as absent, and others than those of the format are left alone. Raises
    BadRecordError, which names the field.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    if kind is not Labelled:
        _check_readable(fields)
    record = _READERS[kind](fields)  # type: ignore[index]  # a variable of this bound is one of them
    assert isinstance(record, kind)
    return record


def _check_readable(fields: Fields) -> None:
    """Raise BadRecordError for what would be learnt as something else than it is."""
    for name in _OTHERS:
        if fields.get(name):
            raise BadRecordError(f'{name} are given, and only text is read')
    if fields.get('label') is False:
        raise BadRecordError('label is false: this answer is one that is not to be learnt (KTO)')


def _text_record(fields: Fields) -> Text:
    return Text(_text(fields, 'text'))


def _labelled(fields: Fields) -> Labelled:
    names = next(
        (pair for pair in _TEXTS if all(name is None or name in fields for name in pair)), None
    )
    if names is None:
        raise _missing(fields, 'no text with a label', 'text, or text and text_pair')
    name = next((name for name in _LABELS if name in fields), None)
    if name is None:
        raise BadRecordError(f'label is missing (there: {_there(fields)})')
    text, other = (None if one is None else _text(fields, one) for one in names)
    return Labelled(text or '', _label(fields[name], name), other)


def _label(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise BadRecordError(f'{name} is {value!r}: give the name or the number of a class')
    if not (label := str(value).strip()):
        raise BadRecordError(f'{name} is empty')
    return label


def _pair(fields: Fields) -> Pair:
    asked, answer = _asked(fields)
    for name in (asked, answer):
        if isinstance(fields[name], list | tuple):
            raise BadRecordError(f'{name} holds messages, where a text is needed')
    return Pair(_question(fields, asked), _text(fields, answer))


def _chat(fields: Fields) -> Chat:
    name = next((name for name in _MESSAGES if isinstance(fields.get(name), list | tuple)), None)
    if name is not None:
        messages = messages_of(fields[name], name)
    else:
        name, answer = _asked(fields, 'messages, conversations')
        messages = [
            *_history(fields),
            *((one, weight or 0.0) for one, weight in _said(fields, name)),
            *(
                [(assistant(_text(fields, answer)), None)]
                if isinstance(fields[answer], str)
                else messages_of(fields[answer], answer)
            ),
        ]
    messages = _with_system(fields, messages)
    check_order([one for one, _ in messages], name)
    weights = weights_of(messages)
    if not any(weights):
        raise BadRecordError(f'{name} has no message to learn: all weights are 0')
    return Chat(tuple(one for one, _ in messages), weights, tools_of(fields))


def _history(fields: Fields) -> list[Weighted]:
    """Turns before, as LLaMA-Factory's `history` [[question, answer], ...] has them."""
    history = fields.get('history') or []
    if not isinstance(history, list | tuple):
        raise BadRecordError('history is no list of [question, answer]')
    texts: list[Any] = []
    for i, turn in enumerate(history):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRecordError(f'history[{i}] is no [question, answer]')
        texts += turn
    return messages_of(texts, 'history') if texts else []


def _preference(fields: Fields) -> Preference:
    if 'preferred_output' in fields and isinstance(fields.get('input'), Mapping):  # OpenAI's
        fields = {
            **fields,
            'prompt': fields['input'].get('messages'),
            'chosen': fields['preferred_output'],
            'rejected': fields.get('non_preferred_output'),
        }
    fields = {name.removesuffix('_messages'): value for name, value in fields.items()}
    for name in ('chosen', 'rejected'):
        if fields.get(name) is None:
            raise _missing(fields, f'no {name}', 'prompt, chosen and rejected')
    prompt, chosen, rejected = _answers(fields)
    for name, answer in (('chosen', chosen), ('rejected', rejected)):
        if not answer or isinstance(answer, str) and not answer.strip():
            raise BadRecordError(f'{name} is empty')
        if not isinstance(answer, str):
            check_order([*prompt, *answer], name)  # type: ignore[list-item]  # of messages as well
    if chosen == rejected:
        raise BadRecordError('chosen and rejected are equal')
    return Preference(prompt, chosen, rejected, _margin(fields))


def _answers(fields: Fields) -> tuple[Prompt, Prompt, Prompt]:
    """Prompt, chosen and rejected; what both answers repeat of the prompt is no part of them."""
    name = _prompt_of(fields)
    chosen, rejected = fields['chosen'], fields['rejected']
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecordError('chosen and rejected are a text and messages: give two of one kind')
    if isinstance(chosen, str):
        if chosen.startswith('\n\nHuman:') and rejected.startswith('\n\nHuman:'):
            return _split(_turns(chosen, 'chosen'), _turns(rejected, 'rejected'))
        if name is None:
            # What both begin with, up to a space: tokens that both have cancel in every loss.
            common = os.path.commonprefix([chosen, rejected])
            common = common[: max(common.rfind(' '), common.rfind('\n'), 0)]
            return common, chosen[len(common) :], rejected[len(common) :]
        if name == 'prompt' and isinstance(fields[name], str) and not _system(fields):
            return _text(fields, name), chosen, rejected
        chosen, rejected = [assistant(chosen)], [assistant(rejected)]
    one, other = (
        tuple(message for message, _ in messages_of(answer, name))
        for answer, name in ((chosen, 'chosen'), (rejected, 'rejected'))
    )
    repeated, *rest = _split(one, other)
    said: list[Weighted]
    if repeated and repeated[0]['role'] != 'assistant':  # as UltraFeedback's, whole chats
        said = [(message, None) for message in repeated]
    elif name is None:
        raise _missing(fields, 'no prompt', 'prompt, chosen and rejected')
    else:
        said, rest = _prompt(fields, name), [one, other]
    return tuple(message for message, _ in _with_system(fields, said)), rest[0], rest[1]


def _prompt_of(fields: Fields) -> str | None:
    """The name of the field that asks, where there is one."""
    chats = [name for name in _MESSAGES if isinstance(fields.get(name), list | tuple)]
    return next((name for name in (*_PROMPTS, *chats) if fields.get(name)), None)


def _prompt(fields: Fields, name: str) -> list[Weighted]:
    return messages_of(fields[name], name) if name in _MESSAGES else _said(fields, name)


Messages = tuple[Any, ...]


def _split(one: Messages, other: Messages) -> tuple[Messages, Messages, Messages]:
    """The messages that both begin with, and the rest of each."""
    both = zip(one, other, strict=False)
    n = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    n = min(n, len(one) - 1, len(other) - 1)
    if not n and one[0]['role'] != 'assistant':
        raise BadRecordError('chosen and rejected begin differently, without a prompt in common')
    return one[:n], one[n:], other[n:]


def _turns(text: str, where: str) -> Messages:
    """Messages of a text with `Human:` and `Assistant:`, as in HH-RLHF."""
    _, *found = _TURNS.split(text)
    roles = {'Human': 'user', 'Assistant': 'assistant'}
    turns = [
        {'role': roles[role], 'content': said.strip()}
        for role, said in zip(found[::2], found[1::2], strict=True)
    ]
    return tuple(message for message, _ in messages_of(turns, where))


def _margin(fields: Fields) -> float:
    margin = fields.get('margin', 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1e9:
        raise BadRecordError(f'margin is {margin!r}: it must be a number of 0 or more')
    return float(margin)


def _problem(fields: Fields) -> Problem:
    name = _prompt_of(fields)
    if name is None:
        raise _missing(fields, 'no prompt', 'prompt and answer, or question and answer')
    if name == 'prompt' and isinstance(fields[name], str) and not _system(fields):
        prompt: Prompt = _text(fields, name)
    else:
        prompt = tuple(message for message, _ in _with_system(fields, _prompt(fields, name)))
        check_order(prompt, name, answered=False)
        if prompt[-1]['role'] == 'assistant':
            raise BadRecordError(f'{name} ends with the assistant, and nothing is asked')
    others = {key: value for key, value in fields.items() if key != name}
    reward = fields.get('reward_model')  # of verl
    if isinstance(reward, Mapping) and reward.get('ground_truth') is not None:
        return Problem(prompt, _answer(reward['ground_truth'], 'reward_model.ground_truth'), others)
    found = next((key for key in _ANSWERS if key in fields and key != name), None)
    if found is None:
        raise BadRecordError(
            f'answer is missing (there: {_there(fields)}): give "" where none is needed'
        )
    answer = _answer(fields[found], found)
    if final := _FINAL.search(answer):
        answer = final[1].strip()
    else:
        del others[found]
    return Problem(prompt, answer, others)


def _answer(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecordError(f'{name} is {type(value).__name__}: give one text or number')
    return str(value)


def _asked(fields: Fields, *other: str) -> tuple[str, str]:
    """The names of what is asked and of what answers it."""
    for asked, answers in _ASKED.items():
        found = next((name for name in answers if name in fields), None)
        if asked in fields and found is not None:
            return asked, found
    known = ('prompt and completion', 'instruction and output', 'source and target')
    raise _missing(fields, 'nothing asked and answered', *other, *known)


def _question(fields: Fields, name: str) -> str:
    """What is asked, with what an instruction is about below it."""
    text = _text(fields, name)
    about = next((fields[key] for key in _INPUTS if fields.get(key)), '')
    if name != 'instruction' or not about:
        return text
    if not isinstance(about, str):
        raise BadRecordError('input is no text')
    return f'{text}\n{about}'


def _said(fields: Fields, name: str) -> list[Weighted]:
    if isinstance(fields[name], str):
        return [(user(_question(fields, name)), None)]
    return messages_of(fields[name], name)


def _system(fields: Fields) -> str:
    text = next((fields[name] for name in _SYSTEM if fields.get(name)), '')
    if not isinstance(text, str):
        raise BadRecordError('system is no text')
    return text


def _with_system(fields: Fields, messages: list[Weighted]) -> list[Weighted]:
    """With the text of `system` before, where none begins the messages."""
    system = _system(fields)
    if not system or messages[0][0]['role'] == 'system':
        return messages
    return [({'role': 'system', 'content': system}, None), *messages]


def _text(fields: Fields, name: str) -> str:
    text = fields.get(name)
    if not isinstance(text, str):
        what = 'missing' if text is None else f'no text ({type(text).__name__})'
        raise BadRecordError(f'{name} is {what}')
    if not text.strip():
        raise BadRecordError(f'{name} is empty')
    return text


def _missing(fields: Fields, what: str, *formats: str) -> BadRecordError:
    return BadRecordError(
        f'{what} (there: {_there(fields)}; needed: {"; ".join(formats)}; '
        '--data.sources.N.rename maps other names)'
    )


def _there(fields: Fields) -> str:
    names = ', '.join(map(str, fields))
    return names[:200] or 'nothing'


_READERS: dict[type[Record], Callable[[Fields], Record]] = {
    Text: _text_record,
    Labelled: _labelled,
    Pair: _pair,
    Chat: _chat,
    Preference: _preference,
    Problem: _problem,
    QueryPassages: query_passages,
}

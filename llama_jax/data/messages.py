"""Messages of chats as people's files have them: roles by many names, calls of tools, weights.

OpenAI's (`role`, `content`, `tool_calls`, `weight`), ShareGPT's (`from`, `value`), pairs of `human`
and `assistant` (MOSS, Firefly), and texts of user and assistant in turn (UltraChat).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.data.record import BadRecordError
from llama_jax.text.chat import Message

_CALLS = ('function_call', 'tool_call', 'function-call')
"""Roles of ShareGPT whose value is a call of the assistant's, as JSON."""
_ROLES = {
    **{role: role for role in ('system', 'user', 'assistant', 'tool', *_CALLS)},
    **dict.fromkeys(('human', 'prompter'), 'user'),
    **dict.fromkeys(('gpt', 'chatgpt', 'bot', 'bard', 'bing', 'model', 'ai'), 'assistant'),
    **dict.fromkeys(('observation', 'function', 'function_response', 'ipython'), 'tool'),
    **dict.fromkeys(('tool_response', 'tool_result', 'function-response'), 'tool'),
    'developer': 'system',
    'system_prompt': 'system',
}
_KEPT = ('name', 'tool_call_id', 'reasoning_content', 'reasoning', 'thinking')
Weighted = tuple[Message, float | None]
"""A message, and its weight where the data gives one."""


def messages_of(value: Any, where: str) -> list[Weighted]:
    """The messages that `value`, the content of the field `where`, holds. Raises BadRecordError."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRecordError(f'{where} is no list of messages ({type(value).__name__})')
    if not value:
        raise BadRecordError(f'{where} is empty')
    if all(isinstance(one, str) for one in value):
        roles = itertools.cycle(('user', 'assistant'))
        value = [{'role': role, 'content': text} for role, text in zip(roles, value, strict=False)]
    if all(isinstance(one, Mapping) and {'human', 'assistant'} <= one.keys() for one in value):
        value = [
            {'role': role, 'content': one[role]} for one in value for role in ('human', 'assistant')
        ]
    return [_message(one, f'{where}[{i}]') for i, one in enumerate(value)]


def user(text: str) -> Message:
    return {'role': 'user', 'content': text}


def assistant(text: str) -> Message:
    return {'role': 'assistant', 'content': text}


def weights_of(messages: Sequence[Weighted]) -> tuple[float, ...]:
    """1 for the assistant's messages and 0 for others', where the data says nothing else."""
    return tuple(
        float(one['role'] == 'assistant') if weight is None else weight for one, weight in messages
    )


def check_order(messages: Sequence[Message], where: str, *, answered: bool = True) -> None:
    """Raise BadRecordError for an order that no template can take: [system] user ... assistant,
    where tools speak only when they were asked. What else a template refuses, it says itself."""
    roles = [message['role'] for message in messages]
    if answered and 'assistant' not in roles:
        raise BadRecordError(f'{where} has no message of the assistant')
    if answered and roles[-1] != 'assistant':
        raise BadRecordError(f'{where} ends with the {roles[-1]}, without an answer')
    first = next((i for i, role in enumerate(roles) if role != 'system'), None)
    if first is None:
        raise BadRecordError(f'{where} has no message but of the system')
    if roles[first] in ('assistant', 'tool'):
        raise BadRecordError(
            f'{where}[{first}] is of the {roles[first]}, and nobody has asked anything before'
        )
    for i, (before, role) in enumerate(itertools.pairwise(roles), start=1):
        if role == 'tool' and before not in ('assistant', 'tool'):
            raise BadRecordError(f'{where}[{i}] is of a tool that no assistant has called')


def tools_of(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """`tools` (a list, or its JSON), or OpenAI's older `functions`. Raises BadRecordError."""
    name = next((name for name in ('tools', 'functions') if fields.get(name)), None)
    if name is None:
        return ()
    given = _json(fields[name], name)
    if not isinstance(given, list) or not all(isinstance(tool, Mapping) for tool in given):
        raise BadRecordError(f'{name} is no list of objects')
    return tuple(
        tool if 'function' in tool else {'type': 'function', 'function': tool} for tool in given
    )


def _message(given: Any, where: str) -> Weighted:
    if not isinstance(given, Mapping):
        raise BadRecordError(f'{where} is no message with role and content')
    said = next((name for name in ('role', 'from') if given.get(name) is not None), None)
    if said is None or not isinstance(given[said], str) or not given[said].strip():
        raise BadRecordError(f'{where} has no role (there: {", ".join(map(str, given))})')
    named = given[said].strip()
    role = _ROLES.get(named.lower(), named)
    fields = ('content', 'value', 'text')
    field = next((name for name in fields if given.get(name) is not None), 'content')
    content, thoughts, called = _content(given.get(field), f'{where}.{field}')
    message: dict[str, Any] = {'role': role, 'content': content}
    message |= {'reasoning_content': thoughts} if thoughts else {}
    calls = called or given.get('tool_calls') or given.get('function_call') or []
    calls = _json(calls, f'{where}.tool_calls')
    if role in _CALLS:
        calls = _json(content, f'{where}.{field}')
        message |= {'role': 'assistant', 'content': None}
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise BadRecordError(f'{where}.tool_calls is no list of calls')
    if calls:
        message['tool_calls'] = [
            _call(call, f'{where}.tool_calls[{j}]') for j, call in enumerate(calls)
        ]
    elif content is None:
        raise BadRecordError(f'{where}.{field} is missing')
    elif message['role'] in ('user', 'assistant') and not content.strip():
        raise BadRecordError(f'{where}.{field} is empty ({message["role"]})')
    message |= {name: given[name] for name in _KEPT if isinstance(given.get(name), str)}
    return message, _weight(given, where)


def _content(content: Any, where: str) -> tuple[str | None, str, list[Any]]:
    """A text, thoughts before it, and calls: parts of a content stand in their kinds."""
    if content is None or isinstance(content, str):
        return content, '', []
    if not isinstance(content, Sequence):
        raise BadRecordError(f'{where} is no text ({type(content).__name__})')
    kinds: dict[str, list[str]] = {'text': [], 'reasoning': [], 'tool_call': []}
    for part in content:
        kind = part.get('type', 'text') if isinstance(part, Mapping) else type(part).__name__
        text = part.get('text', part.get('value')) if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in kinds or not isinstance(text, str):
            raise BadRecordError(f'{where} holds a part of type {kind}, and only text is read')
        kinds[kind].append(text)
    return ''.join(kinds['text']), ''.join(kinds['reasoning']), kinds['tool_call']


def _call(call: Any, where: str) -> dict[str, Any]:
    """As templates read it: arguments are an object, of which files often have the JSON."""
    call = _json(call, where)
    if not isinstance(call, Mapping) or not isinstance(call.get('function', call), Mapping):
        raise BadRecordError(f'{where} is no call with a name and arguments')
    function = call.get('function', call)
    if not isinstance(name := function.get('name'), str) or not name:
        raise BadRecordError(f'{where} is no call with a name and arguments')
    arguments = function.get('arguments', function.get('parameters'))
    arguments = _json(arguments, f'{where}.arguments') if arguments else {}
    if not isinstance(arguments, Mapping):
        raise BadRecordError(f'{where}.arguments is no object')
    made: dict[str, Any] = {'type': 'function', 'function': {'name': name, 'arguments': arguments}}
    return made | ({'id': call['id']} if isinstance(call.get('id'), str) else {})


def _json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRecordError(f'{where} is no JSON: {value[:60]!r}') from None


def _weight(given: Mapping[str, Any], where: str) -> float | None:
    """`weight` (OpenAI's, a number), `loss_weight` (LLaMA-Factory's), or `train` (a flag)."""
    for name in ('weight', 'loss_weight', 'train'):
        weight = given.get(name)
        if weight is None:
            continue
        if not isinstance(weight, bool | int | float) or not 0 <= weight < 1e9:
            raise BadRecordError(f'{where}.{name} is {weight!r}: it must be a number of 0 or more')
        return float(weight)
    return None

"""Chat templates differ in what they take for a call of a function: the forms of a conversation
with calls, and the first of them that a template writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llama_jax.errors import UserError
from llama_jax.text.chat import Conversation, Message
from llama_jax.text.marked import Marked, of_message
from llama_jax.text.rendering import run


def written(
    source: str, tokens: Mapping[str, Any], conversation: Conversation
) -> tuple[Conversation, Marked]:
    """The form of the conversation that the template takes, and its text. As it is given comes
    first, which is what `transformers` takes. Raises UserError where none can be written."""
    if not any(message.get('tool_calls') for message in conversation.messages):
        return conversation, run(source, tokens, conversation)
    whole = _completed(conversation)
    failures = []
    for form in (conversation, whole, _with_json(conversation), _with_json(whole)):
        try:
            text = run(source, tokens, form)
        except UserError as error:
            failures.append(error)
            continue
        if failures and without_calls(source, tokens, form) == text:
            continue  # the model would read a message that says nothing
        if not _prints_objects(form, text):
            return form, text
    refusals = (error for error in failures if 'refuses' in str(error))
    raise next(refusals, failures[0])


def without_calls(
    source: str, tokens: Mapping[str, Any], conversation: Conversation
) -> Marked | None:
    """The text where the assistant calls nothing; None: the template needs the calls."""
    try:
        return run(source, tokens, conversation.without_calls())
    except UserError:
        return None


def _completed(conversation: Conversation) -> Conversation:
    """With '' for a content that is None, and the name of the function on each answer of a tool
    that says by its id alone what it answers: clients leave out both."""
    names: dict[Any, Any] = {}
    messages: list[Message] = []
    for message in conversation.messages:
        names |= {
            call['id']: function.get('name')
            for function, call in _functions(message)
            if call.get('id')
        }
        more: dict[str, Any] = {}
        if message.get('content') is None:
            more['content'] = ''
        name = names.get(message.get('tool_call_id'))
        if name and message['role'] == 'tool' and message.get('name') is None:
            more['name'] = name
        messages.append({**message, **more})
    return replace(conversation, messages=messages)


def _with_json(conversation: Conversation) -> Conversation:
    """With the JSON of arguments in place of the object: some templates join it to their text."""
    messages = [
        {**message, 'tool_calls': [_as_json(call) for call in message['tool_calls']]}
        if message.get('tool_calls')
        else message
        for message in conversation.messages
    ]
    return replace(conversation, messages=messages)


def _as_json(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get('function')
    if not isinstance(function, Mapping) or not isinstance(function.get('arguments'), Mapping):
        return call
    try:
        arguments = json.dumps(function['arguments'], ensure_ascii=False)
    except RecursionError:
        raise UserError('the arguments of a call are nested too deep') from None
    return {**call, 'function': {**function, 'arguments': arguments}}


def _prints_objects(conversation: Conversation, text: Marked) -> bool:
    """Whether the template prints arguments as Python spells them, which is no JSON. A message that
    says them so itself, as the errors of some tools do, is none of the template's doing."""
    messages = conversation.messages
    for message in messages:
        for function, _ in _functions(message):
            given = function.get('arguments')
            if not given or not isinstance(given, Mapping):
                continue
            spelled = re.compile(re.escape(str(given)))
            marks = {
                mark for at in spelled.finditer(text) for mark in text.marks[slice(*at.span())]
            }
            if marks:  # rarely; and who of all says so is looked for then alone
                says = (i for i, other in enumerate(messages) if _says(other, spelled.search))
                if marks - set(map(of_message, says)):
                    return True
    return False


def _says(message: Message, search: Callable[[str], Any]) -> bool:
    """Whether a text of the message, calls apart, has what is searched for."""
    parts = [value for key, value in message.items() if key != 'tool_calls']
    while parts:
        part = parts.pop()
        if isinstance(part, str) and search(part):
            return True
        if isinstance(part, Mapping):
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part
    return False


def _functions(message: Message) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """What a message calls, each with the call of which it is a part."""
    calls = message.get('tool_calls') or ()
    return [(call['function'], call) for call in calls if isinstance(call.get('function'), Mapping)]

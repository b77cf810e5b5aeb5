"""Chat templates differ in what they take for a call of a function: the forms of a conversation
with calls, and the first of them that a template writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llama_jax.errors import UserError
from llama_jax.text.chat import Conversation, Message
from llama_jax.text.marked import Marked
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
    arguments = json.dumps(function['arguments'], ensure_ascii=False)
    return {**call, 'function': {**function, 'arguments': arguments}}


def _prints_objects(conversation: Conversation, text: str) -> bool:
    """Whether arguments are in the text as Python spells them, which is no JSON."""
    given = [
        function.get('arguments')
        for message in conversation.messages
        for function, _ in _functions(message)
    ]
    return any(one and isinstance(one, Mapping) and str(one) in text for one in given)


def _functions(message: Message) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """What a message calls, each with the call of which it is a part."""
    calls = message.get('tool_calls') or ()
    return [(call['function'], call) for call in calls if isinstance(call.get('function'), Mapping)]

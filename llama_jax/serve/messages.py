"""Chats that clients send: messages, tools, and how the prompt ends."""

from __future__ import annotations

import json
from typing import Any

from llama_jax.errors import UserError
from llama_jax.serve.accepted import MESSAGE_UNREAD, PART_UNREAD
from llama_jax.serve.body import Fields, shown
from llama_jax.serve.errors import ApiError
from llama_jax.serve.tools import TOOL_FIELDS, Tools
from llama_jax.text.chat import ChatFormat, Conversation

CONVERSATION_FIELDS = {
    *('documents', 'chat_template_kwargs', 'add_generation_prompt', 'continue_final_message'),
    *TOOL_FIELDS,
}
_MESSAGE_FIELDS = {
    *('role', 'content', 'name', 'tool_calls', 'tool_call_id'),
    *('reasoning_content', 'reasoning', 'thinking', 'refusal'),
}


def conversation_of(fields: Fields, chat: ChatFormat, tools: Tools) -> Conversation:
    """Of the body of a chat; every role that the model's format takes is taken."""
    given = fields.array('messages')
    if not given:
        fields.bad('messages', 'is empty: give at least one message')
    messages = [_message(item, f'messages[{i}]', chat) for i, item in enumerate(given)]
    continues = fields.boolean('continue_final_message')
    if continues and fields.boolean('add_generation_prompt'):
        fields.bad(
            'add_generation_prompt', 'is true, and so is continue_final_message: leave one out'
        )
    try:
        return Conversation(
            messages,
            add_generation_prompt=fields.boolean('add_generation_prompt', True),
            continue_final_message=continues,
            tools=list(tools.given) or None,
            documents=_objects(fields, 'documents') or None,
            variables=_variables(fields, chat),
        )
    except UserError as error:
        raise ApiError(400, str(error), param='messages') from None


def _objects(fields: Fields, name: str) -> list[dict[str, Any]]:
    items = fields.array(name) or []
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            fields.bad(f'{name}[{i}]', 'is no object')
    return items


def _variables(fields: Fields, chat: ChatFormat) -> dict[str, Any]:
    variables = fields.object('chat_template_kwargs') or {}
    effort = fields.text('reasoning_effort', '')
    if effort and chat.knows('reasoning_effort'):
        variables = {'reasoning_effort': effort, **variables}
    for name in ('messages', *CONVERSATION_FIELDS):
        if name in variables:
            fields.bad(f'chat_template_kwargs.{name}', 'is a field of its own: give it beside')
    return variables


def _message(item: Any, path: str, chat: ChatFormat) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ApiError(400, f'{path} is no object: give role and content', param=path)
    # Some templates ask whether a field is there, so an absent one stays absent; and clients send
    # back what they were answered, with all that was empty there.
    empty: tuple[Any, ...] = ([], {}, '')
    message = Fields(
        {k: v for k, v in item.items() if k in ('role', 'content') or v not in empty},
        known=_MESSAGE_FIELDS,
        unread=MESSAGE_UNREAD,
        path=f'{path}.',
    )
    role = message.text('role', '')
    if not role.strip():
        message.bad(
            'role', "is missing: give 'system', 'user', 'assistant' or what the model knows"
        )
    if role == 'developer' and not chat.knows(role):
        role = 'system'  # OpenAI's other name for it
    made: dict[str, Any] = {'role': role}
    content = message.raw('content')
    calls = message.array('tool_calls')
    if isinstance(content, list):
        made['content'] = [_part(part, f'{path}.content[{j}]') for j, part in enumerate(content)]
    elif isinstance(content, str) or (content is None and calls):
        made['content'] = content
    elif content is None and role == 'assistant':
        made['content'] = message.text('refusal', '')
    else:
        message.bad('content', 'is no text: give a string, or parts of type text')
    if calls:
        made['tool_calls'] = [_call(one, f'{path}.tool_calls[{j}]') for j, one in enumerate(calls)]
    for name in ('name', 'tool_call_id', 'reasoning_content', 'reasoning', 'thinking'):
        if message.has(name):
            made[name] = message.text(name, '')
    return made


def _part(part: Any, path: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ApiError(400, f'{path} is no object: give type and text', param=path)
    fields = Fields(part, known={*part}, path=f'{path}.')
    kind = fields.text('type', '')
    if kind not in ('text', 'refusal'):
        fields.bad('type', f"is {shown(fields.raw('type'))}: only 'text' is supported")
    Fields(part, known={'type', kind}, unread=PART_UNREAD, path=f'{path}.')
    return {'type': 'text', 'text': fields.text(kind, '')}


def _call(call: Any, path: str) -> dict[str, Any]:
    """As templates read it: arguments are an object, of which OpenAI's clients send the JSON."""
    if not isinstance(call, dict) or not isinstance(call.get('function'), dict):
        raise ApiError(400, f'{path} is no call: give function with name, arguments', param=path)
    function = Fields(call['function'], known={'name', 'arguments'}, path=f'{path}.function.')
    if not function.text('name', ''):
        function.bad('name', 'is missing: give a string')
    arguments = function.raw('arguments')
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or '{}')
        except (ValueError, RecursionError):
            function.bad('arguments', 'is no JSON: give an object, or its text')
    if arguments is not None and not isinstance(arguments, dict):
        function.bad('arguments', 'is no object')
    if not isinstance(call.get('id'), str | None):
        raise ApiError(400, f'{path}.id is no string', param=f'{path}.id')
    # In the order in which models were trained to read it, for templates that print it whole.
    made = {'id': call['id']} if call.get('id') else {}
    made |= {'type': 'function', 'function': None, **call}
    made['function'] = {'name': function.text('name', ''), 'arguments': arguments or {}}
    return made

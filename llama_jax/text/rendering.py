"""A chat template (Jinja) to text, bounded in time and size (text/sandbox.py), in which every
character knows who wrote it (text/marked.py)."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llama_jax import installed
from llama_jax.errors import UserError
from llama_jax.text.budget import LONGEST, TooMuchError
from llama_jax.text.chat import Conversation, one_line
from llama_jax.text.marked import CONTINUED, GIVEN, ROLE, TEMPLATE, UNKNOWN, Marked, of_message

if TYPE_CHECKING:
    from llama_jax.text.sandbox import Compiled

_ROLES = frozenset(
    {
        *('system', 'developer', 'user', 'assistant', 'tool', 'function', 'ipython', 'model'),
        *('environment', 'document', 'documents', 'context', 'observation', 'tools'),
    }
)
"""Roles that may be part of a control token's name, as in `'<|' + message['role'] + '|>'`."""
REASONING = ('reasoning_content', 'thinking', 'reasoning')
"""What templates and clients call an assistant's thoughts."""
CONTINUED_TAG = 'CONTINUE_FINAL_MESSAGE_TAG '
_SOURCE = 1 << 18
"""Characters of a template at most; the longest known one has 40,000."""


def run(source: str, tokens: Mapping[str, Any], conversation: Conversation) -> Marked:
    compiled = _compiled(source)
    for name in conversation.variables:
        if name not in compiled.names:
            raise UserError(
                f'the chat template does not know {one_line(name)}: leave the variable out'
            )
    given = _Given()
    try:
        variables = {
            **{name: given(text, TEMPLATE) for name, text in tokens.items()},
            **{name: given(value, GIVEN) for name, value in conversation.variables.items()},
            'messages': _messages(conversation, given),
            'tools': given(conversation.tools, GIVEN),
            'documents': given(conversation.documents, GIVEN),
            'add_generation_prompt': conversation.add_generation_prompt,
        }
    except RecursionError:
        raise UserError('the chat is nested too deeply') from None
    except TooMuchError:
        raise UserError(f'the chat holds a text of more than {LONGEST} characters') from None
    try:
        return compiled.run(variables, given.characters)
    except TooMuchError as error:
        raise UserError(f'the chat template {error}') from None
    except RecursionError:
        raise UserError('the chat template calls itself without end') from None
    except Exception as error:  # a template can raise whatever Python can
        kind = type(error).__name__
        what = 'refuses' if kind == 'RefusedError' else f'fails ({kind})'
        said = re.sub(r'(llama_jax\.text\.marked\.)?\bMarked\b', 'str', str(error)[:_SOURCE])
        why = one_line(said)
        silent = [i for i, one in enumerate(conversation.messages) if one.get('content') is None]
        if silent and kind in ('TypeError', 'UndefinedError'):
            why += f"; message {silent[0]} has no content: give it one, such as ''"
        raise UserError(f'the chat template {what}: {why}') from None


_LOCK = threading.Lock()


def _compiled(source: str) -> Compiled:
    with _LOCK:
        return _compile(source)


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> Compiled:
    try:
        from jinja2 import TemplateError

        from llama_jax.text.sandbox import Compiled
    except ModuleNotFoundError as error:
        raise UserError(
            f'a chat template takes {error.name}: {installed.extra("weights")}'
        ) from None
    if len(source) > _SOURCE:
        raise UserError(f'the chat template has {len(source)} characters: at most {_SOURCE}')
    try:
        return Compiled(source)
    except TemplateError as error:
        line = f' (line {lineno})' if (lineno := getattr(error, 'lineno', None)) else ''
        raise UserError(f'the chat template is no Jinja{line}: {one_line(str(error))}') from None
    except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
        raise UserError(
            f'the chat template cannot be read ({type(error).__name__}): it is nested too deeply'
        ) from None


class _Given:
    """Marks the strings of JSON, and counts their characters."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            self.characters += len(value)
            return Marked(str.__str__(value), mark)
        if isinstance(value, Mapping):
            return {self(key, mark): self(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item, mark) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise UserError(f'a chat holds a {type(value).__name__}, which is no JSON')


def _messages(conversation: Conversation, given: _Given) -> list[dict[Any, Any]]:
    messages = []
    for i, message in enumerate(conversation.messages):
        marked = given(message, of_message(i))
        role = message.get('role')
        if isinstance(role, str):
            # A name of its own that becomes part of a control token is refused: it cannot be told
            # whether the template means it.
            marked['role'] = Marked(role, ROLE if role in _ROLES else UNKNOWN)
        thoughts = next((marked[key] for key in REASONING if marked.get(key) is not None), None)
        if thoughts is not None:
            marked = {'thinking': thoughts, **marked, 'reasoning_content': thoughts}
        messages.append(marked)
    if conversation.continue_final_message:
        last = messages[-1]
        content = last.get('content')
        tag = Marked(CONTINUED_TAG, CONTINUED)
        if isinstance(content, list):
            part = next(part for part in reversed(content) if 'text' in part)
            part['text'] = part['text'] + tag
        else:
            last['content'] = content + tag
    return messages

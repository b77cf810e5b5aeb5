"""A model's own chat template (Jinja), from messages to token ids.

The template says which control tokens stand where, and nobody else: what a message spells stays
text (text/marked.py), what the template spells is a token. Templates run bounded in time and size
(text/sandbox.py).
"""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.budget import LONGEST, TooMuchError
from llama_jax.text.chat import Conversation, Message, one_line, text_of_content
from llama_jax.text.marked import (
    CONTINUED,
    GIVEN,
    ROLE,
    TEMPLATE,
    UNKNOWN,
    Marked,
    is_message,
    of_message,
)
from llama_jax.text.vocabulary import Vocabulary, encode_parts

if TYPE_CHECKING:
    from llama_jax.text.sandbox import Compiled

log = logging.getLogger(__name__)

_ROLES = frozenset(
    {
        *('system', 'developer', 'user', 'assistant', 'tool', 'function', 'ipython', 'model'),
        *('environment', 'document', 'documents', 'context', 'observation', 'tools'),
    }
)
"""Roles that may be part of a control token's name, as in `'<|' + message['role'] + '|>'`."""
_REASONING = ('reasoning_content', 'thinking', 'reasoning')
"""What templates and clients call an assistant's thoughts."""
_TEXT_ENDS = ('<|endoftext|>', '<|end_of_text|>', '<|eom_id|>', '<|eom|>')
"""Tokens that end an answer wherever a vocabulary has them."""
_NAMES = re.compile(r'<\|[^<|>\s]+\|>|<(?:start|end)_of_turn>')
"""What spells a control token in the templates of most makers."""
_CONTINUED = 'CONTINUE_FINAL_MESSAGE_TAG '
_SOURCE = 1 << 18
"""Characters of a template at most; the longest known one has 40,000."""


@dataclass(frozen=True)
class Template:
    """A chat format that a template writes."""

    source: str
    tokens: Mapping[str, Any] | None = None
    """Variables of the template: `bos_token`, `eos_token` and others, by what they spell. None: as
    the vocabulary spells these two."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Templates for a purpose: `tool_use` is taken where tools are given, `rag` where documents
    are."""

    def encode(
        self, conversation: Conversation, vocabulary: Vocabulary, *, begin: Sequence[int] = ()
    ) -> list[int]:
        """The prompt. `begin` is left out: a template writes the begin token where the model was
        trained with it, as for `apply_chat_template` of transformers.

        A message that the template leaves out is told in the log. Raises UserError for a
        conversation that the template refuses, tools and documents that it ignores, and for a
        template that fails or does too much.
        """
        tokens = self._spelt(vocabulary)
        parts = control_apart(self._rendered(conversation, tokens), _control(vocabulary, tokens))
        return encode_parts(vocabulary, parts)

    def ends(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """The control token behind an assistant's message, where one follows, and those that end a
        text."""
        ends = tuple(vocabulary.control[name] for name in _TEXT_ENDS if name in vocabulary.control)
        said = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
        tokens = self._spelt(vocabulary)
        try:
            text = self._rendered(Conversation(said, add_generation_prompt=False), tokens)
            after = text[text.marks.rindex(of_message(1)) + 1 :]
            parts = control_apart(after, _control(vocabulary, tokens))
        except (UserError, ValueError):
            return ends
        first = [part for part in parts if isinstance(part, int) or part.strip()][:1]
        return (*(part for part in first if isinstance(part, int)), *ends)

    def unknown(self, vocabulary: Vocabulary) -> list[str]:
        """What it writes as control tokens and the vocabulary has not: the model reads text."""
        said = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
        tokens = self._spelt(vocabulary)
        try:
            text = self._rendered(Conversation(said), tokens)
        except UserError:
            return []
        return sorted({*_NAMES.findall(text)} - {*_control(vocabulary, tokens)})

    def render(self, conversation: Conversation) -> str:
        """The text of the prompt; control tokens are spelled by name."""
        return str.__str__(self._rendered(conversation, self.tokens or {}))

    def _rendered(self, conversation: Conversation, tokens: Mapping[str, Any]) -> Marked:
        """The text of the prompt, which knows who wrote it."""
        source = self.source
        for name, given in (('tool_use', conversation.tools), ('rag', conversation.documents)):
            if given and name in self.named:
                source = self.named[name]
        in_parts = any(isinstance(one.get('content'), list) for one in conversation.messages)
        if in_parts and not _takes_parts(source, tokens):
            conversation = conversation.joined()
        text = _run(source, tokens, conversation)
        left = _left_out(conversation.messages, text)
        if left is not None and _takes_parts(source, tokens):
            text = _run(source, tokens, conversation.in_parts())  # it may take nothing else
            left = _left_out(conversation.messages, text)
        if left is not None:
            said = f'what message {left} ({one_line(conversation.messages[left]["role"])}) says'
            _tell_left_out(source, said)
        if any(message.get('tool_calls') for message in conversation.messages):
            try:
                without = _run(source, tokens, conversation.without_calls())
            except UserError:
                without = None  # it needs them
            if without == text:
                _tell_left_out(source, 'the tool_calls of all messages')
        for what in ('tools', 'documents'):
            if getattr(conversation, what):
                nothing: Any = {what: None}
                try:
                    without = _run(source, tokens, replace(conversation, **nothing))
                except UserError:
                    continue  # it needs them
                if without == text:
                    raise UserError(f'the chat template ignores {what}: leave them out')
        return _to_continue(text) if conversation.continue_final_message else text

    def knows(self, word: str) -> bool:
        """Whether the template mentions it."""
        return any(word in source for source in (self.source, *self.named.values()))

    def _spelt(self, vocabulary: Vocabulary) -> Mapping[str, Any]:
        if self.tokens is not None:
            return self.tokens
        names = {i: name for name, i in vocabulary.control.items()}
        ids = {'bos_token': vocabulary.bos_id, 'eos_token': vocabulary.eos_id}
        return {name: names[i] for name, i in ids.items() if i in names}


def _control(vocabulary: Vocabulary, tokens: Mapping[str, Any]) -> dict[str, int]:
    control = dict(vocabulary.control)
    for name, i in (('bos_token', vocabulary.bos_id), ('eos_token', vocabulary.eos_id)):
        spelt = tokens.get(name)
        if isinstance(spelt, str) and spelt and i is not None:
            control.setdefault(spelt, i)
    return control


def _run(source: str, tokens: Mapping[str, Any], conversation: Conversation) -> Marked:
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
            f"a chat template takes {error.name}: pip install -e '.[weights]'"
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


@functools.lru_cache(maxsize=64)
def _parts_taken(source: str, tokens: str) -> bool:
    said = [{'role': 'user', 'content': [{'type': 'text', 'text': 'probe'}]}]
    try:
        text = _run(source, json.loads(tokens), Conversation(said))
    except UserError:
        return False
    return [
        char for char, mark in zip(str.__str__(text), text.marks, strict=True) if is_message(mark)
    ] == list('probe')


def _takes_parts(source: str, tokens: Mapping[str, Any]) -> bool:
    """Whether a template reads contents in parts, and does not print them as Python spells them."""
    return _parts_taken(source, json.dumps(dict(tokens)))


def control_apart(text: Marked, control: Mapping[str, int]) -> list[str | int]:
    """Pieces of text, and the ids of the control tokens that the template wrote between them.

    A name is a token where the template wrote all of it, and text where a message wrote a part.
    Raises UserError where that cannot be told.
    """
    names = sorted((name for name in control if name), key=len, reverse=True)
    if not names:
        return [str.__str__(text)] if text else []
    pattern = re.compile('|'.join(map(re.escape, names)))

    def found(runs: str) -> list[tuple[int, int]]:
        plain = str.__str__(text)
        return [
            match.span()
            for run in re.finditer(runs, text.marks)
            for match in pattern.finditer(plain, *run.span())
        ]

    own = TEMPLATE + ROLE
    spans = found(f'[{own}]+')
    if UNKNOWN in text.marks:
        other = set(found(f'[{own}{re.escape(UNKNOWN)}]+')) ^ set(spans)
        if other:
            start, end = min(other)
            raise UserError(
                f'the chat template makes {str.__str__(text[start:end])} in a way that leaves open '
                'who wrote it, the template or a message: take it out of the messages'
            )
    parts: list[str | int] = []
    at = 0
    for start, end in spans:
        if start > at:
            parts.append(str.__str__(text[at:start]))
        parts.append(control[str.__str__(text[start:end])])
        at = end
    if at < len(text):
        parts.append(str.__str__(text[at:]))
    return parts


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
        thoughts = next((marked[key] for key in _REASONING if marked.get(key) is not None), None)
        if thoughts is not None:
            marked = {'thinking': thoughts, **marked, 'reasoning_content': thoughts}
        messages.append(marked)
    if conversation.continue_final_message:
        last = messages[-1]
        content = last.get('content')
        tag = Marked(_CONTINUED, CONTINUED)
        if isinstance(content, list):
            part = next(part for part in reversed(content) if 'text' in part)
            part['text'] = part['text'] + tag
        else:
            last['content'] = content + tag
    return messages


def _to_continue(text: Marked) -> Marked:
    """The text up to the place where the last message goes on."""
    runs = [run.span() for run in re.finditer(f'{CONTINUED}+', text.marks)]
    tag = str.__str__(text[slice(*runs[-1])]) if runs else ''
    if tag.strip() != _CONTINUED.strip():
        raise UserError(
            'the chat template does not print the last message as it is, so it cannot be continued'
        )
    text = text[: runs[-1][0]]
    # A template that trims the message would have trimmed it without the tag as well.
    return text if tag == _CONTINUED else text.rstrip()


def _left_out(messages: Sequence[Message], text: Marked) -> int | None:
    """The first message that says something of which nothing is in the text."""
    codes = np.frombuffer(text.marks.encode('utf-32-le'), '<u4')
    ends = np.flatnonzero(np.diff(codes, append=0))  # of runs: a set of all marks takes long
    seen = {chr(code) for code in codes[ends]}
    if UNKNOWN in seen and _unknown_words(text):
        return None  # it may be in what was not followed
    for i, message in enumerate(messages):
        if of_message(i) not in seen and text_of_content(message).strip():
            return i
    return None


@functools.lru_cache(maxsize=256)
def _tell_left_out(source: str, what: str) -> None:
    """Once for each place of each template: a server would repeat it with every request."""
    log.warning('the chat template leaves out %s: the model does not read it', what)


def _unknown_words(text: Marked) -> bool:
    """Whether a part that was not followed is more than a number."""
    runs = re.finditer(f'{re.escape(UNKNOWN)}+', text.marks)
    return any(re.search(r'[^\W\d]', str.__str__(text[slice(*run.span())])) for run in runs)

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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.chat import (
    Conversation,
    Message,
    UnwrittenError,
    end_ids,
    one_line,
    text_of_content,
)
from llama_jax.text.forms import without_calls, written
from llama_jax.text.marked import CONTINUED, UNKNOWN, Marked, is_message, of_message
from llama_jax.text.rendering import CONTINUED_TAG, REASONING, run
from llama_jax.text.turns import Turns, alike, check_whole, control_parts, turns_of
from llama_jax.text.vocabulary import Vocabulary, encode_parts

log = logging.getLogger(__name__)

_TEXT_ENDS = ('<|endoftext|>', '<|end_of_text|>', '<|eom_id|>', '<|eom|>')
"""Tokens that end an answer wherever a vocabulary has them."""
_NAMES = re.compile(r'<\|[^<|>\s]+\|>|<(?:start|end)_of_turn>')
"""What spells a control token in the templates of most makers."""


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
        text = self._rendered(conversation, tokens)
        parts, _ = control_parts(text, _control(vocabulary, tokens))
        return encode_parts(vocabulary, parts)

    def turns(
        self,
        conversation: Conversation,
        vocabulary: Vocabulary,
        *,
        learnt: Collection[int],
        begin: Sequence[int] = (),
    ) -> Turns:
        """A turn begins where the prompt ends that asks for it. That prompt is rendered only where
        the template writes something else before the turn than before an earlier one, or than
        behind a user's words."""
        tokens = self._spelt(vocabulary)
        source, conversation, text = self._chosen(
            replace(conversation, add_generation_prompt=False), tokens
        )
        self._check(source, conversation, tokens, text)
        left = _left_out(conversation.messages, text)
        if left is not None:
            raise UserError(f'the chat template leaves out what message {left} says: take it out')
        for i in learnt:
            check_whole(text, i, _said(conversation.messages[i]))
        asked = _asked(source, json.dumps(dict(tokens)))
        asking = {} if asked is None else {'user': asked}
        starts = {
            i: self._start(text, source, conversation, tokens, i, asking) for i in sorted(learnt)
        }
        parts, widths = control_parts(text, _control(vocabulary, tokens))
        return turns_of(
            parts,
            vocabulary,
            starts=starts,
            ends=end_ids(self, vocabulary),
            last=len(conversation.messages) - 1,
            widths=widths,
        )

    def _start(
        self,
        text: Marked,
        source: str,
        conversation: Conversation,
        tokens: Mapping[str, Any],
        i: int,
        asking: dict[str, str],
    ) -> int | None:
        """The character at which the turn of message `i` begins; None: at its first own. `asking`
        is what stands between the words of a role and the end of the prompt, as found so far."""
        messages = conversation.messages
        if messages[i]['role'] != 'assistant' or not i:
            return None
        first = text.marks.index(of_message(i))
        # Where the words end that stand before, and what the template has between.
        said = next((k for k in range(first, 0, -1) if is_message(text.marks[k - 1])), 0)
        between = str.__str__(text[said:first])
        before, role = text.marks[said - 1] if said else None, messages[i - 1]['role']
        follows = before == of_message(i - 1)
        if follows and role in asking and between.startswith(asking[role]):
            return said + len(asking[role])
        prompt = replace(conversation, messages=messages[:i], add_generation_prompt=True)
        try:
            rendered = run(source, tokens, prompt)
        except UserError:  # no prompt ends there
            return None
        if said <= len(rendered) <= first and str.startswith(text, rendered):
            if follows:
                asking[role] = between[: len(rendered) - said]
            return len(rendered)
        if before is None or before not in rendered.marks:
            return None
        # The template writes earlier turns otherwise when later ones follow, or ends the prompt
        # within the turn (DeepSeek-R1 by `<think>`): what both have behind the last words.
        same = alike(str.__str__(rendered[rendered.marks.rindex(before) + 1 :]), between)
        return said + same if same else None

    def ends(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """The control token behind an assistant's message, where one follows, and those that end a
        text."""
        ends = tuple(vocabulary.control[name] for name in _TEXT_ENDS if name in vocabulary.control)
        tokens = self._spelt(vocabulary)
        after = _behind_answer(self.source, json.dumps(dict(tokens)))
        try:
            parts, _ = control_parts(after, _control(vocabulary, tokens))
        except UserError:
            return ends
        first = [part for part in parts if isinstance(part, int) or part.strip()][:1]
        return (*(part for part in first if isinstance(part, int)), *ends)

    def unknown(self, vocabulary: Vocabulary) -> list[str]:
        """What it writes as control tokens and the vocabulary has not: the model reads text."""
        tokens = self._spelt(vocabulary)
        try:
            text = self._rendered(Conversation(_SAID), tokens)
        except UserError:
            return []
        return sorted({*_NAMES.findall(text)} - {*_control(vocabulary, tokens)})

    def render(self, conversation: Conversation) -> str:
        """The text of the prompt; control tokens are spelled by name."""
        return str.__str__(self._rendered(conversation, self.tokens or {}))

    def _rendered(self, conversation: Conversation, tokens: Mapping[str, Any]) -> Marked:
        """The text of the prompt, which knows who wrote it."""
        source, conversation, text = self._chosen(conversation, tokens)
        self._check(source, conversation, tokens, text)
        return _to_continue(text) if conversation.continue_final_message else text

    def _chosen(
        self, conversation: Conversation, tokens: Mapping[str, Any]
    ) -> tuple[str, Conversation, Marked]:
        """The template for a conversation, the form of it that the template reads, and the text."""
        source = self.source
        for name, given in (('tool_use', conversation.tools), ('rag', conversation.documents)):
            if given and name in self.named:
                source = self.named[name]
        in_parts = any(isinstance(one.get('content'), list) for one in conversation.messages)
        if in_parts and not _takes_parts(source, tokens):
            conversation = conversation.joined()
        conversation, text = written(source, tokens, conversation)
        if _left_out(conversation.messages, text) is not None and _takes_parts(source, tokens):
            conversation = conversation.in_parts()  # it may take nothing else
            text = run(source, tokens, conversation)
        return source, conversation, text

    def _check(
        self, source: str, conversation: Conversation, tokens: Mapping[str, Any], text: Marked
    ) -> None:
        """Tell what is left out of the text, and refuse tools and documents that are."""
        left = _left_out(conversation.messages, text)
        if left is not None:
            said = f'what message {left} ({one_line(conversation.messages[left]["role"])}) says'
            _tell_left_out(source, said)
        called = any(message.get('tool_calls') for message in conversation.messages)
        if called and without_calls(source, tokens, conversation) == text:
            _tell_left_out(source, 'the tool_calls of all messages')
        for what in ('tools', 'documents'):
            if getattr(conversation, what):
                nothing: Any = {what: None}
                try:
                    without = run(source, tokens, replace(conversation, **nothing))
                except UserError:
                    continue  # it needs them
                if without == text:
                    raise UnwrittenError(
                        what,
                        f'the chat template ignores {what}: leave them out, or take a template '
                        'that prints them (--chat-template)',
                    )

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


@functools.lru_cache(maxsize=64)
def _parts_taken(source: str, tokens: str) -> bool:
    said = [{'role': 'user', 'content': [{'type': 'text', 'text': 'probe'}]}]
    try:
        text = run(source, json.loads(tokens), Conversation(said))
    except UserError:
        return False
    return [
        char for char, mark in zip(str.__str__(text), text.marks, strict=True) if is_message(mark)
    ] == list('probe')


_SAID = ({'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'})


@functools.lru_cache(maxsize=64)
def _asked(source: str, tokens: str) -> str | None:
    """What stands between a user's words and the end of the prompt; None where none is written."""
    try:
        text = run(source, json.loads(tokens), Conversation(_SAID[:1]))
        return str.__str__(text[text.marks.rindex(of_message(0)) + 1 :])
    except (UserError, ValueError):
        return None


@functools.lru_cache(maxsize=64)
def _behind_answer(source: str, tokens: str) -> Marked:
    """What stands behind an assistant's words at the end of a chat."""
    try:
        text = run(source, json.loads(tokens), Conversation(_SAID, add_generation_prompt=False))
        return text[text.marks.rindex(of_message(1)) + 1 :]
    except (UserError, ValueError):
        return Marked()


def _takes_parts(source: str, tokens: Mapping[str, Any]) -> bool:
    """Whether a template reads contents in parts, and does not print them as Python spells them."""
    return _parts_taken(source, json.dumps(dict(tokens)))


def _to_continue(text: Marked) -> Marked:
    """The text up to the place where the last message goes on."""
    runs = [run.span() for run in re.finditer(f'{CONTINUED}+', text.marks)]
    tag = str.__str__(text[slice(*runs[-1])]) if runs else ''
    if tag.strip() != CONTINUED_TAG.strip():
        raise UserError(
            'the chat template does not print the last message as it is, so it cannot be continued'
        )
    text = text[: runs[-1][0]]
    # A template that trims the message would have trimmed it without the tag as well.
    return text if tag == CONTINUED_TAG else text.rstrip()


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


def _said(message: Message) -> str:
    """All words of a message, its thoughts and what it calls included."""
    thoughts = next((message[key] for key in REASONING if message.get(key) is not None), '')
    calls = message.get('tool_calls') or ()
    names = (
        call.get('function', call).get('name', '') for call in calls if isinstance(call, Mapping)
    )
    return ''.join(map(str, (thoughts, text_of_content(message), *names)))


def _unknown_words(text: Marked) -> bool:
    """Whether a part that was not followed is more than a number."""
    runs = re.finditer(f'{re.escape(UNKNOWN)}+', text.marks)
    return any(re.search(r'[^\W\d]', str.__str__(text[slice(*run.span())])) for run in runs)

"""Chats to token ids, as the models were trained to read them.

Control tokens are ids of their own and text is encoded apart from them, so nothing that a message
spells can open or close a turn.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llama_jax.errors import UserError
from llama_jax.text.vocabulary import Vocabulary

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

ROLES = ('system', 'user', 'assistant')


class ChatFormat(Protocol):
    @property
    def ends(self) -> tuple[str, ...]:
        """Names of control tokens that end an answer, besides the end ids of the vocabulary."""

    def encode(self, messages: Sequence[Message], vocabulary: Vocabulary) -> list[int]:
        """The prompt that asks for the assistant's next message.

        Raises UserError for messages in another order than [system] user (assistant user)*, and for
        a vocabulary without the control tokens of the format.
        """


@dataclass(frozen=True)
class ChatML:
    """`<|im_start|>role\\ncontent<|im_end|>\\n` for each message (SmolLM2 and others)."""

    default_system: str | None = None
    """What the system says in a chat that begins with the user; None: nothing."""
    ends: tuple[str, ...] = ('<|im_end|>', '<|endoftext|>')

    def encode(self, messages: Sequence[Message], vocabulary: Vocabulary) -> list[int]:
        turns = _turns(messages)
        if turns[0][0] != 'system' and self.default_system is not None:
            turns.insert(0, ('system', self.default_system))
        start, end = (_control(vocabulary, name) for name in ('<|im_start|>', '<|im_end|>'))
        ids = []
        for role, content in turns:
            ids += [start, *_ids(vocabulary, f'{role}\n{content}'), end, *_ids(vocabulary, '\n')]
        return [*ids, start, *_ids(vocabulary, 'assistant\n')]


@dataclass(frozen=True)
class Headers:
    """A header with the role before each message (Llama 3 and 4, as in Meta's code: contents are
    left as they are, and there is no system message but the given one)."""

    start: str
    stop: str
    """Around the role."""
    end: str
    """After each message."""
    ends: tuple[str, ...]
    begin: str = '<|begin_of_text|>'

    def encode(self, messages: Sequence[Message], vocabulary: Vocabulary) -> list[int]:
        start, stop, end, begin = (
            _control(vocabulary, name) for name in (self.start, self.stop, self.end, self.begin)
        )

        def header(role: str) -> list[int]:
            return [start, *_ids(vocabulary, role), stop, *_ids(vocabulary, '\n\n')]

        ids = [begin]
        for role, content in _turns(messages):
            ids += [*header(role), *_ids(vocabulary, content), end]
        return [*ids, *header('assistant')]


@dataclass(frozen=True)
class Llama2:
    """`[INST] user [/INST] answer` between bos and eos, the system's message within the first."""

    ends: tuple[str, ...] = ()

    def encode(self, messages: Sequence[Message], vocabulary: Vocabulary) -> list[int]:
        bos_id, eos_id = vocabulary.bos_id, vocabulary.eos_id
        if bos_id is None:
            raise UserError('a chat of Llama 2 begins with bos, which the vocabulary does not have')
        turns = _turns(messages)
        for role, content in turns:
            tag = next((tag for tag in _LLAMA2_TAGS if tag in content), None)
            # These tags are text, and whoever spells one could speak in another's name.
            if tag:
                raise UserError(
                    f'the {role} message holds {tag}, which means something to Llama 2: take it out'
                )
        if turns[0][0] == 'system':
            (_, system), (_, first), *rest = turns
            turns = [('user', f'<<SYS>>\n{system}\n<</SYS>>\n\n{first}'), *rest]
        ids: list[int] = []
        contents = [content.strip() for _, content in turns]
        for user, answer in itertools.zip_longest(contents[::2], contents[1::2]):
            if answer is None:
                ids += [bos_id, *_ids(vocabulary, f'[INST] {user} [/INST]')]
            else:
                ids += [bos_id, *_ids(vocabulary, f'[INST] {user} [/INST] {answer} '), eos_id]
        return ids


_LLAMA2_TAGS = ('[INST]', '[/INST]', '<<SYS>>', '<</SYS>>')

LLAMA2 = Llama2()
LLAMA3 = Headers(
    start='<|start_header_id|>',
    stop='<|end_header_id|>',
    end='<|eot_id|>',
    ends=('<|eot_id|>', '<|end_of_text|>', '<|eom_id|>'),
)
LLAMA4 = Headers(
    start='<|header_start|>',
    stop='<|header_end|>',
    end='<|eot|>',
    ends=('<|eot|>', '<|end_of_text|>', '<|eom|>'),
)


def from_template(template: str) -> ChatFormat | None:
    """The format that a template of a model's file writes (Jinja, which is read and not run); None
    for one that is none of these."""
    if '<|im_start|>' in template:
        default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^<{}'\"]+)<\|im_end\|>", template)
        return ChatML(default[1] if default else None)
    for format_ in (LLAMA3, LLAMA4):
        if format_.start in template:
            return format_
    return LLAMA2 if '[INST]' in template and '<<SYS>>' in template else None


def end_ids(format_: ChatFormat | None, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Every id that ends an answer: to stop at eos alone would run past the end of a turn."""
    names = format_.ends if format_ else ()
    control = vocabulary.control
    return tuple(
        dict.fromkeys((*vocabulary.end_ids, *(control[name] for name in names if name in control)))
    )


def _turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Role and content of each message, in the order that a chat has."""
    if not messages:
        raise UserError('a chat without messages: give at least one of the user')
    turns = []
    for i, message in enumerate(messages):
        role, content = message.get('role'), message.get('content')
        if role not in ROLES:
            raise UserError(f'message {i} has the role {role!r}: it must be one of {_or(ROLES)}')
        if not isinstance(content, str):
            raise UserError(f'message {i} ({role}) has no text as its content: give a string')
        turns.append((role, content))
    expected: Iterator[str] = itertools.cycle(('user', 'assistant'))
    first = 1 if turns[0][0] == 'system' else 0
    for i, (role, _) in enumerate(turns[first:], first):
        if role != (due := next(expected)):
            raise UserError(
                f'message {i} is of the {role}, where the {due} has the turn: a chat is [system] '
                'user, then assistant and user in turns'
            )
    if turns[-1][0] != 'user':
        raise UserError(
            f'the last message is of the {turns[-1][0]}: end with the user, whom the model answers'
        )
    return turns


def _or(names: Sequence[str]) -> str:
    return f'{", ".join(names[:-1])} or {names[-1]}'


def _control(vocabulary: Vocabulary, name: str) -> int:
    try:
        return vocabulary.control[name]
    except KeyError:
        raise UserError(
            f'the vocabulary has no {name}: this chat format is of another model'
        ) from None


def _ids(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.encode(text).tolist()

"""Chats to token ids, as the models were trained to read them.

A model's own template comes first (text/template.py). The formats here are for models without one:
Meta's directories, which are told by their vocabulary, and whatever `--chat-template` names.
Control tokens are ids of their own and text is encoded apart from them, so nothing that a message
spells can open or close a turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.marked import TEMPLATE, Marked, of_message
from llama_jax.text.turns import NOBODY, Turns, turns_of
from llama_jax.text.vocabulary import Vocabulary, encode_parts

Message = Mapping[str, Any]
"""`role`, `content` (a text, or parts of type text), and what else a template knows: `name`,
`tool_calls`, `tool_call_id`, `reasoning_content`."""


class UnwrittenError(UserError):
    """A format has no place for a part of a conversation."""

    def __init__(self, what: str, message: str):
        """`what`: the name of the part, as in Conversation."""
        super().__init__(message)
        self.what = what


@dataclass(frozen=True)
class Conversation:
    """What a prompt is made of. Raises UserError for messages that are none."""

    messages: Sequence[Message]
    add_generation_prompt: bool = True
    """The prompt ends where the assistant's next message begins."""
    continue_final_message: bool = False
    """The prompt ends within the last message, which goes on; no generation prompt is added."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Functions that the model may call, by their JSON schemas."""
    documents: Sequence[Mapping[str, Any]] | None = None
    """Texts to answer from: `title` and `text`."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""

    def __post_init__(self) -> None:
        if not self.messages:
            raise UserError('a chat without messages: give at least one of the user')
        for i, message in enumerate(self.messages):
            _check(i, message)
        if self.continue_final_message:
            object.__setattr__(self, 'add_generation_prompt', False)
            last = self.messages[-1]
            if not text_of_content(last):
                raise UserError(
                    f'the last message ({last["role"]}) has no text that could be continued'
                )

    def joined(self) -> Conversation:
        """With texts in place of parts."""
        return self._with_contents(_joined)

    def in_parts(self) -> Conversation:
        """With parts in place of texts."""
        return self._with_contents(
            lambda content: (
                [{'type': 'text', 'text': content}] if isinstance(content, str) else content
            )
        )

    def without_calls(self) -> Conversation:
        """Without what the assistant called."""
        messages = [
            {key: value for key, value in message.items() if key != 'tool_calls'}
            | {'content': message.get('content') or ''}
            for message in self.messages
        ]
        return replace(self, messages=messages)

    def _with_contents(self, change: Callable[[Any], Any]) -> Conversation:
        messages = [
            {**message, 'content': change(message['content'])} if 'content' in message else message
            for message in self.messages
        ]
        return replace(self, messages=messages)


def _check(i: int, message: Message) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f'message {i} is no object: give role and content')
    role, content = message.get('role'), message.get('content')
    if not isinstance(role, str) or not role.strip():
        raise UserError(f'message {i} has the role {role!r}: give user, assistant or another name')
    if isinstance(content, list):
        for part in content:
            kind = part.get('type') if isinstance(part, Mapping) else None
            if kind != 'text' or not isinstance(part.get('text'), str):
                raise UserError(
                    f'message {i} ({role}) holds a part of type {kind!r}: only text is read, as '
                    "{'type': 'text', 'text': '...'}"
                )
    elif not isinstance(content, str) and not (content is None and message.get('tool_calls')):
        raise UserError(
            f'message {i} ({role}) has no text as its content: give a string, or parts of type text'
        )


def text_of_content(message: Message) -> str:
    """What a message says, without its calls of tools."""
    return _joined(message.get('content')) or ''


def _joined(content: Any) -> Any:
    return ''.join(part['text'] for part in content) if isinstance(content, list) else content


class ChatFormat(Protocol):
    def ends(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Control tokens that end an answer, besides the end ids of the vocabulary."""

    def knows(self, word: str) -> bool:
        """Whether it treats a role, or a variable, in a way of its own."""

    def encode(
        self, conversation: Conversation, vocabulary: Vocabulary, *, begin: Sequence[int] = ()
    ) -> list[int]:
        """The prompt, which starts with `begin` exactly once.

        Raises UserError for a conversation that the format cannot write, and for a vocabulary
        without its control tokens.
        """

    def turns(
        self,
        conversation: Conversation,
        vocabulary: Vocabulary,
        *,
        learnt: Collection[int],
        begin: Sequence[int] = (),
    ) -> Turns:
        """The same ids without a generation prompt, and which of them are in the turns of the
        messages `learnt`: what the assistant writes when it is asked, its end of turn included (of
        another's message, its words and what ends them).

        Raises UserError as `encode` does, for a message that the format leaves out, and for one of
        `learnt` of which it leaves out a part.
        """


def begun(ids: list[int], begin: Sequence[int]) -> list[int]:
    """`ids` with `begin` before them, unless they start with it."""
    return ids if ids[: len(begin)] == list(begin) else [*begin, *ids]


class _Plain:
    """A format without a template: what only a template could write is refused."""

    names: tuple[str, ...]
    """Of the control tokens that end an answer."""

    def ends(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        control = vocabulary.control
        return tuple(control[name] for name in self.names if name in control)

    def knows(self, word: str) -> bool:
        return word in ('system', 'user', 'assistant')

    def encode(
        self, conversation: Conversation, vocabulary: Vocabulary, *, begin: Sequence[int] = ()
    ) -> list[int]:
        parts = self.parts(self._turns(conversation), conversation, vocabulary)
        return begun(encode_parts(vocabulary, parts), begin)

    def turns(
        self,
        conversation: Conversation,
        vocabulary: Vocabulary,
        *,
        learnt: Collection[int],
        begin: Sequence[int] = (),
    ) -> Turns:
        conversation = replace(conversation, add_generation_prompt=False)
        said = [
            (Marked(role, TEMPLATE), Marked(text, of_message(i)))
            for i, (role, text) in enumerate(self._turns(conversation))
        ]
        parts = [
            part if isinstance(part, int) else Marked(part)
            for part in self.parts(said, conversation, vocabulary)
        ]
        found = turns_of(
            parts,
            vocabulary,
            starts=dict.fromkeys(learnt),
            ends=end_ids(self, vocabulary),
            last=len(said) - 1,
        )
        ids = begun(found.ids.tolist(), begin)
        nobody = np.full(len(ids) - len(found.ids), NOBODY, np.int32)
        return Turns(np.array(ids, np.int32), np.concatenate([nobody, found.message]))

    def _turns(self, conversation: Conversation) -> list[tuple[str, str]]:
        """Role and text of each message."""
        for what in ('tools', 'documents', 'variables'):
            if getattr(conversation, what):
                raise UnwrittenError(
                    what, f'{what} are given, and the model has no chat template for them'
                )
        turns = []
        for i, message in enumerate(conversation.messages):
            if message.get('tool_calls'):
                raise UserError(
                    f'message {i} has tool_calls, and the model has no chat template for them'
                )
            turns.append((message['role'], text_of_content(message)))
        return turns

    def parts(
        self, turns: Sequence[tuple[str, str]], conversation: Conversation, vocabulary: Vocabulary
    ) -> Iterator[str | int]:
        """Texts, and the ids of control tokens between them. Texts are joined by +, so that those
        of `turns` may know who wrote them (text/marked.py)."""
        raise NotImplementedError


@dataclass(frozen=True)
class ChatML(_Plain):
    """`<|im_start|>role\\ncontent<|im_end|>\\n` for each message."""

    names: tuple[str, ...] = ('<|im_end|>', '<|endoftext|>')

    def parts(
        self, turns: Sequence[tuple[str, str]], conversation: Conversation, vocabulary: Vocabulary
    ) -> Iterator[str | int]:
        start, end = (_control(vocabulary, name) for name in ('<|im_start|>', '<|im_end|>'))
        for i, (role, content) in enumerate(turns, 1):
            yield start
            yield role + '\n' + content
            if not (conversation.continue_final_message and i == len(turns)):
                yield end
                yield '\n'
        if conversation.add_generation_prompt:
            yield start
            yield 'assistant\n'


@dataclass(frozen=True)
class Headers(_Plain):
    """A header with the role before each message (Llama 3 and 4, as in Meta's code: contents are
    left as they are, there is no system message but the given one, and tools answer as ipython)."""

    start: str
    stop: str
    """Around the role."""
    end: str
    """After each message."""
    names: tuple[str, ...]
    begin: str = '<|begin_of_text|>'

    def parts(
        self, turns: Sequence[tuple[str, str]], conversation: Conversation, vocabulary: Vocabulary
    ) -> Iterator[str | int]:
        start, stop, end, begin = (
            _control(vocabulary, name) for name in (self.start, self.stop, self.end, self.begin)
        )
        yield begin
        for i, (role, content) in enumerate(turns, 1):
            yield from (start, _META_ROLES.get(role, role), stop, '\n\n' + content)
            if not (conversation.continue_final_message and i == len(turns)):
                yield end
        if conversation.add_generation_prompt:
            yield from (start, 'assistant', stop, '\n\n')


_META_ROLES = {'developer': 'system', 'tool': 'ipython'}


@dataclass(frozen=True)
class Llama2(_Plain):
    """`[INST] user [/INST] answer` between bos and eos, the system's message within the first.

    Raises UserError for another order than [system] user (assistant user)*, which the format cannot
    write."""

    names: tuple[str, ...] = ()

    def parts(
        self, turns: Sequence[tuple[str, str]], conversation: Conversation, vocabulary: Vocabulary
    ) -> Iterator[str | int]:
        bos_id, eos_id = vocabulary.bos_id, vocabulary.eos_id
        if bos_id is None:
            raise UserError('a chat of Llama 2 begins with bos, which the vocabulary does not have')
        turns = _in_turns(turns)
        contents = [content.strip() for _, content in turns]
        pairs = itertools.zip_longest(contents[::2], contents[1::2])
        for i, (user, answer) in enumerate(pairs, 1):
            yield bos_id
            last = 2 * i == len(contents)
            if answer is None:
                yield '[INST] ' + user + ' [/INST]'
            elif last and conversation.continue_final_message:
                yield '[INST] ' + user + ' [/INST] ' + answer
            else:
                yield '[INST] ' + user + ' [/INST] ' + answer + ' '
                yield eos_id


_LLAMA2_TAGS = ('[INST]', '[/INST]', '<<SYS>>', '<</SYS>>')


def _in_turns(turns: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """User and assistant in turns; the system's message is the beginning of the first."""
    for role, content in turns:
        tag = next((tag for tag in _LLAMA2_TAGS if tag in content), None)
        # These tags are text, and whoever spells one could speak in another's name.
        if tag:
            raise UserError(
                f'the {role} message holds {tag}, which means something to Llama 2: take it out'
            )
    if turns[0][0] == 'system' and len(turns) > 1:
        (_, system), (role, first), *rest = turns
        turns = [(role, '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + first), *rest]
    for i, ((role, _), due) in enumerate(zip(turns, itertools.cycle(('user', 'assistant')))):
        if role != due:
            raise UserError(
                f'message {i} (not counting a first one of the system) is of the {role}, where the '
                f'{due} has the turn: a chat of Llama 2 is [system] user, then assistant and user '
                'in turns'
            )
    return turns


LLAMA2 = Llama2()
LLAMA3 = Headers(
    start='<|start_header_id|>',
    stop='<|end_header_id|>',
    end='<|eot_id|>',
    names=('<|eot_id|>', '<|end_of_text|>', '<|eom_id|>'),
)
LLAMA4 = Headers(
    start='<|header_start|>',
    stop='<|header_end|>',
    end='<|eot|>',
    names=('<|eot|>', '<|end_of_text|>', '<|eom|>'),
)
FORMATS: dict[str, ChatFormat] = {
    'chatml': ChatML(),
    'llama2': LLAMA2,
    'llama3': LLAMA3,
    'llama4': LLAMA4,
}


def by_vocabulary(vocabulary: Vocabulary) -> ChatFormat | None:
    """The format whose control tokens a vocabulary has, for files that do not say."""
    control = vocabulary.control
    for format_ in (LLAMA3, LLAMA4):
        if format_.start in control and format_.end in control:
            return format_
    return FORMATS['chatml'] if {'<|im_start|>', '<|im_end|>'} <= control.keys() else None


def end_ids(format_: ChatFormat | None, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Every id that ends an answer: to stop at eos alone would run past the end of a turn."""
    ends = format_.ends(vocabulary) if format_ else ()
    return tuple(dict.fromkeys((*vocabulary.end_ids, *ends)))


def one_line(text: str, most: int = 300) -> str:
    """Text of others within a message of ours."""
    text = ' '.join(text.split())
    return text if len(text) <= most else f'{text[: most - 1]}…'


def _control(vocabulary: Vocabulary, name: str) -> int:
    try:
        return vocabulary.control[name]
    except KeyError:
        raise UserError(
            f'the vocabulary has no {name}: this chat format is of another model'
        ) from None

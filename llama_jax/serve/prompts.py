"""What clients send as text or token ids: prompts, and sources of an encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.errors import UserError
from llama_jax.serve.body import Fields
from llama_jax.serve.errors import ApiError
from llama_jax.serve.served import Served
from llama_jax.text.chat import Conversation, UnwrittenError
from llama_jax.text.vocabulary import TooLongError, refuse_surrogates, within


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    text: str | None
    """As it was given, where it was text."""


def source_of(fields: Fields, served: Served) -> tuple[int, ...] | None:
    """What the encoder reads for every prompt."""
    given = fields.raw('source')
    if served.read_source is None:
        if given is not None:
            fields.bad('source', 'is given, but this model has no encoder: leave it out')
        return None
    if isinstance(given, str):
        with _blamed('source', served.source_length):
            ids = tuple(served.read_source(given))
    elif isinstance(given, list):
        ids = fields.check_ids('source', given, vocab=served.engine.config.ids)
    else:
        fields.bad('source', 'is needed for the encoder: give a string or token ids')
    if not ids:
        fields.bad('source', 'has no tokens: give at least one')
    if len(ids) > served.source_length:
        fields.bad('source', f'has {len(ids)} tokens: at most {served.source_length}')
    return ids


def prompts_of(
    fields: Fields,
    name: str,
    served: Served,
    *,
    most: int,
    begun: bool = True,
    suffix: str = '',
    default: str | None = None,
) -> list[Prompt]:
    """A text, token ids, or an array of either. `begun`: texts begin as the model expects it. With
    a `suffix`, prompts that ask for the text between."""
    given = fields.raw(name) if fields.has(name) else default
    if given is None:
        fields.bad(name, 'is missing: give a string, token ids, or an array of these')
    if isinstance(given, str) or (
        isinstance(given, list) and given and not isinstance(given[0], str | list)
    ):
        given = [given]
    if not isinstance(given, list):
        fields.bad(name, 'is neither text nor token ids: give a string or an array')
    if not given:
        fields.bad(name, 'is an empty array: give at least one')
    if len(given) > most:
        fields.bad(name, f'holds {len(given)} prompts: at most {most}')
    prompts = []
    items: list[Any] = given
    for item in items:
        read: str | tuple[int, ...]
        if isinstance(item, str):
            read = item
        elif isinstance(item, list):
            read = fields.check_ids(name, item, vocab=served.engine.config.ids)
        else:
            fields.bad(name, 'mixes kinds: give strings, or arrays of token ids')
        with _blamed(name, served.engine.length):
            if suffix:
                ids = _between(served, read, suffix)
            elif isinstance(read, str):
                ids = _encoded(served, read) if begun else _plain(served, read)
            else:
                ids = read
        if not ids:
            fields.bad(name, 'holds a prompt without tokens: give at least one')
        prompts.append(Prompt(ids, item if isinstance(item, str) else None))
    return prompts


def chat_ids(fields: Fields, served: Served, conversation: Conversation) -> tuple[int, ...]:
    """The prompt of a chat, by the model's own format."""
    assert served.chat is not None  # or there were no chat
    length, n_messages = served.engine.length, len(conversation.messages)
    if n_messages > length:  # each of them takes a token, and the template takes its time for each
        fields.bad('messages', f'holds {n_messages} messages: at most {length}')
    vocabulary = within(served.vocabulary, length)
    with _blamed('messages', length):
        try:
            return tuple(served.chat.encode(conversation, vocabulary, begin=served.begin))
        except UnwrittenError as error:
            param = 'chat_template_kwargs' if error.what == 'variables' else error.what
            raise ApiError(400, str(error), param=param) from None


def suffix_of(fields: Fields, served: Served) -> str:
    """What the text is to be followed by; '' for nothing."""
    suffix = fields.text('suffix', '')
    if suffix and served.infill is None:
        fields.bad('suffix', 'is given, but this model does not infill: leave it out')
    if suffix and fields.boolean('echo'):
        fields.bad('echo', 'is given with suffix: leave one of them out')
    with _blamed('suffix', served.engine.length):
        refuse_surrogates(suffix)
    return suffix


def _between(served: Served, prefix: str | Sequence[int], suffix: str) -> tuple[int, ...]:
    assert served.infill is not None  # suffix_of saw to it
    vocabulary = within(served.vocabulary, served.engine.length)
    return (*served.begin, *served.infill.prompt(prefix, suffix, vocabulary))


def _encoded(served: Served, text: str) -> tuple[int, ...]:
    """A text to continue; a document's beginning where it is empty."""
    ids = (*served.begin, *_plain(served, text))
    bos_id = served.vocabulary.bos_id
    return ids if ids or bos_id is None else (bos_id,)


def _plain(served: Served, text: str) -> tuple[int, ...]:
    return tuple(served.vocabulary.encode(text, most=served.engine.length).tolist())


@contextlib.contextmanager
def _blamed(name: str, length: int) -> Iterator[None]:
    """Around what makes tokens of a field, at most `length`: its errors name the field."""
    try:
        yield
    except TooLongError:
        raise ApiError(
            400,
            f'{name} of more than {length} tokens: at most {length} in all, shorten it',
            param=name,
            code='context_length_exceeded',
        ) from None
    except UserError as error:
        raise ApiError(400, str(error), param=name) from None

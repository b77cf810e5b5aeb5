"""Answers to chats: text, and calls of tools that are told apart from it."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterator, Sequence

from llama_jax.engine.request import Event, Finish, Piece
from llama_jax.serve.responses import (
    Choice,
    CompletionReply,
    Json,
    Reply,
    Scored,
    entries,
    scored_of,
)
from llama_jax.serve.schema import Ask
from llama_jax.serve.served import Served
from llama_jax.text.calls import Call, CallParser

_LETTERS = string.ascii_letters + string.digits


def reply_of(served: Served, ask: Ask) -> Reply:
    return (ChatReply if ask.kind == 'chat' else CompletionReply)(served, ask)


class ChatReply(Reply):
    name, whole_object, chunk_object = 'chatcmpl', 'chat.completion', 'chat.completion.chunk'

    def __init__(self, served: Served, ask: Ask):
        super().__init__(served, ask)
        self._parsers = [_parser(ask) for _ in ask.requests]

    def chunks(self, index: int, event: Event) -> Iterator[Json]:
        parser = self._parsers[index]
        if parser is not None and isinstance(event, Piece):
            scored = [scored_of(one) for one in event.logprobs]
            parts = parser(event.text) or ([''] if scored else [])
            yield from self._parts(index, parts, scored)
            return
        if parser is not None and isinstance(event, Finish):
            yield from self._parts(index, parser.finish(), [])
        yield from super().chunks(index, event)

    def _parts(
        self, index: int, parts: Sequence[str | Call], scored: list[Scored]
    ) -> Iterator[Json]:
        """Texts and calls; the first of their chunks has the log-probabilities."""
        for part in parts:
            if isinstance(part, str):
                yield self._tell(index, part, scored)
            else:
                yield from self._call(index, part, scored)
            scored = []

    def _call(self, index: int, call: Call, scored: list[Scored]) -> Iterator[Json]:
        """The name first, then the arguments, as clients put them together."""
        calls = self._choices[index].calls
        place, function = len(calls), {'name': call.name, 'arguments': call.arguments}
        whole = {'id': _call_id(), 'type': 'function', 'function': function}
        calls.append(whole)
        begun = {**whole, 'function': {**function, 'arguments': ''}}
        for told in (begun, {'function': {'arguments': call.arguments}}):
            chunk = self._tell(index, '', scored)
            chunk['choices'][0]['delta'] = {'tool_calls': [{'index': place, **told}]}
            yield chunk
            scored = []

    def _reason(self, choice: Choice) -> str | None:
        reason = super()._reason(choice)
        return 'tool_calls' if choice.calls and reason == 'stop' else reason

    def _opening(self, index: int) -> Iterator[Json]:
        chunk = self._chunk(index, '', [])
        content = '' if self._parsers[index] is None else None  # where there may be calls alone
        chunk['choices'][0]['delta'] = {'role': 'assistant', 'content': content}
        yield chunk

    def _delta(self, text: str, finish: str | None) -> Json:
        silent = finish or (self._ask.tools.told and not text)
        return {'delta': {} if silent else {'content': text}}

    def _message(self, text: str, calls: list[Json]) -> Json:
        message: Json = {'role': 'assistant', 'content': text, 'refusal': None}
        if calls:
            message |= {'content': text or None, 'tool_calls': calls}
        return {'message': message}

    def _logprobs(self, scored: Sequence[Scored], text: str, start: int) -> Json:
        return {'content': entries(self._spelling, scored), 'refusal': None}


def _parser(ask: Ask) -> CallParser | None:
    """Tells calls from text, where the model was told of tools."""
    tools = ask.tools
    if not tools.told or tools.format is None:
        return None
    most = None if tools.several else 1
    return CallParser(tools.format, tools.callable, most=most, thinking=ask.thinking)


def _call_id() -> str:
    """Nine letters and digits, which Mistral's templates insist on."""
    return ''.join(secrets.choice(_LETTERS) for _ in range(9))

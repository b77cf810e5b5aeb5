"""Events of the engine to the JSON of OpenAI's API, in one piece or as a stream of chunks."""

from __future__ import annotations

import base64
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_jax.engine.request import Event, Finish, PromptScores
from llama_jax.generate.controls import Logprob
from llama_jax.serve.errors import ApiError
from llama_jax.serve.prompts import Prompt
from llama_jax.serve.schema import Ask
from llama_jax.serve.served import Served
from llama_jax.text.vocabulary import Vocabulary

Json = dict[str, Any]
_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability; the first of a prompt has none."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Choice:
    """What has been told of one choice."""

    text: list[str] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    characters: int = 0
    prompt: list[Scored] | None = None
    finish: Finish | None = None
    drawn: list[float] = field(default_factory=list)
    """Log-probabilities of its own tokens."""
    calls: list[Json] = field(default_factory=list)
    """Of tools."""

    @property
    def mean(self) -> float:
        """Of the log-probabilities of its own tokens."""
        return sum(self.drawn) / len(self.drawn) if self.drawn else _LOWEST


class Reply(ABC):
    """The answer to one completion, or chat (chat_responses.py)."""

    name: str
    whole_object: str
    chunk_object: str

    def __init__(self, served: Served, ask: Ask):
        self._vocabulary, self._model, self._ask = served.vocabulary, served.name, ask
        self._spelling = Spelling(served.vocabulary)
        self._id = f'{self.name}-{secrets.token_hex(12)}'
        self._created = int(time.time())
        self._choices = [Choice() for _ in ask.requests]

    def opening(self) -> Iterator[Json]:
        """Chunks before anything has happened."""
        for i in range(len(self._choices)):
            yield from self._opening(i)

    def chunks(self, index: int, event: Event) -> Iterator[Json]:
        """What an event of choice `index` tells, to be sent at once. Raises ApiError for a failure
        of the engine."""
        choice, ask = self._choices[index], self._ask
        if isinstance(event, Finish):
            choice.finish = event
            if event.reason == 'error':
                raise ApiError(500, event.message or 'generation failed', code='engine_error')
            ends = [event.end] if event.end else []
            choice.drawn += [one.logprob for one in ends]
            told = [scored_of(one) for one in ends if ask.logprobs is not None]
            yield self._chunk(index, '', told, finish=self._reason(choice))
            choice.scored += told
        elif isinstance(event, PromptScores):
            choice.prompt = self._of_prompt(ask.prompt(index), event)
            if ask.echo and ask.logprobs is not None:
                yield self._tell(index, self._echo(index), choice.prompt, prompt=choice.prompt)
            elif ask.prompt_logprobs:
                yield self._tell(index, '', [], prompt=choice.prompt)
        else:
            choice.drawn += [one.logprob for one in event.logprobs]
            if event.text or (event.logprobs and ask.logprobs is not None):
                yield self._tell(index, event.text, [scored_of(one) for one in event.logprobs])

    def whole(self) -> Json:
        """The answer after every choice has finished."""
        for choice in self._choices:
            if choice.finish is None or choice.finish.reason == 'cancelled':
                raise ApiError(503, 'the server is shutting down: try again', code='shutting_down')
        return {
            **self._head(self.whole_object),
            'choices': [self._whole(i, choice) for i, choice in enumerate(self._told())],
            'usage': self.usage(),
        }

    def _told(self) -> list[Choice]:
        """Of each prompt the `n` best, best first; as they were drawn where all are told."""
        n, best_of = self._ask.n, self._ask.best_of
        if n == best_of:
            return self._choices
        return [
            choice
            for first in range(0, len(self._choices), best_of)
            for choice in sorted(
                self._choices[first : first + best_of], key=lambda choice: -choice.mean
            )[:n]
        ]

    def usage_chunk(self) -> Json:
        return {**self._head(self.chunk_object), 'choices': [], 'usage': self.usage()}

    def usage(self) -> Json:
        """Prompts count once, however many choices they have."""
        ends = [choice.finish for choice in self._choices if choice.finish]
        firsts = [choice.finish for choice in self._choices[:: self._ask.best_of] if choice.finish]
        read = sum(len(prompt.ids) for prompt in self._ask.prompts)
        written = sum(end.completion_tokens for end in ends)
        return {
            'prompt_tokens': read,
            'completion_tokens': written,
            'total_tokens': read + written,
            'prompt_tokens_details': {'cached_tokens': sum(end.cached_tokens for end in firsts)},
        }

    @abstractmethod
    def _opening(self, index: int) -> Iterator[Json]: ...

    @abstractmethod
    def _delta(self, text: str, finish: str | None) -> Json:
        """The text of a chunk's choice."""

    @abstractmethod
    def _message(self, text: str, calls: list[Json]) -> Json:
        """The text of a whole choice, and its calls of tools."""

    @abstractmethod
    def _logprobs(self, scored: Sequence[Scored], text: str, start: int) -> Json:
        """Of `text`, which begins at character `start` of the choice."""

    def _reason(self, choice: Choice) -> str | None:
        """Why a choice ended, as clients are told."""
        return choice.finish.reason if choice.finish else None

    def _head(self, kind: str) -> Json:
        return {'id': self._id, 'object': kind, 'created': self._created, 'model': self._model}

    def _echo(self, index: int) -> str:
        prompt = self._ask.prompt(index)
        return prompt.text if prompt.text is not None else self._vocabulary.decode(prompt.ids)

    def _tell(
        self, index: int, text: str, scored: list[Scored], prompt: list[Scored] | None = None
    ) -> Json:
        """A chunk, kept for the whole as well."""
        choice = self._choices[index]
        chunk = self._chunk(index, text, scored, prompt=prompt)
        choice.text.append(text)
        choice.scored += scored
        choice.characters += len(text)
        return chunk

    def _chunk(
        self,
        index: int,
        text: str,
        scored: list[Scored],
        *,
        finish: str | None = None,
        prompt: list[Scored] | None = None,
    ) -> Json:
        logprobs = None
        if scored and self._ask.logprobs is not None:
            logprobs = self._logprobs(scored, text, self._choices[index].characters)
        choice = {
            'index': index,
            **self._delta(text, finish),
            'logprobs': logprobs,
            'finish_reason': finish,
        }
        if prompt is not None and self._ask.prompt_logprobs:
            choice['prompt_logprobs'] = entries(self._spelling, prompt)
        chunk = {**self._head(self.chunk_object), 'choices': [choice]}
        if self._ask.include_usage:
            chunk['usage'] = None
        return chunk

    def _whole(self, index: int, choice: Choice) -> Json:
        text = ''.join(choice.text)
        logprobs = None
        if self._ask.logprobs is not None:
            logprobs = self._logprobs(choice.scored, text, 0)
        whole = {
            'index': index,
            **self._message(text, choice.calls),
            'logprobs': logprobs,
            'finish_reason': self._reason(choice),
        }
        if self._ask.prompt_logprobs:
            whole['prompt_logprobs'] = entries(self._spelling, choice.prompt or [])
        return whole

    def _of_prompt(self, prompt: Prompt, scores: PromptScores) -> list[Scored]:
        return [Scored(prompt.ids[0], None), *map(scored_of, scores.logprobs)]


class CompletionReply(Reply):
    name, whole_object, chunk_object = 'cmpl', 'text_completion', 'text_completion'

    def _opening(self, index: int) -> Iterator[Json]:
        if self._ask.echo and self._ask.logprobs is None:
            yield self._tell(index, self._echo(index), [])

    def _delta(self, text: str, finish: str | None) -> Json:
        return {'text': text}

    def _message(self, text: str, calls: list[Json]) -> Json:
        return {'text': text}

    def _logprobs(self, scored: Sequence[Scored], text: str, start: int) -> Json:
        spelled = [self._spelling(one.token) for one in scored]
        tops = [self._top(one) if one.top else None for one in scored]
        return {
            'tokens': spelled,
            'token_logprobs': [_finite(one.logprob) for one in scored],
            'top_logprobs': tops if self._ask.logprobs else None,
            'text_offset': _offsets(self._vocabulary, scored, text, start),
        }

    def _top(self, scored: Scored) -> dict[str, float | None]:
        """Tokens that are spelled alike: the likelier one counts. The token drawn is among them."""
        pairs = [*scored.top, (scored.token, scored.logprob)]
        top: dict[str, float | None] = {}
        for token, logprob in pairs:
            top.setdefault(self._spelling(token), _finite(logprob))
        return top


def embedding_list(
    served: Served, vectors: np.ndarray, inputs: Sequence[Sequence[int]], *, as_base64: bool
) -> Json:
    """`vectors` float32 [n, D]; base64 is of little-endian float32."""

    def told(vector: np.ndarray) -> str | list[float]:
        if as_base64:
            return base64.b64encode(vector.astype('<f4').tobytes()).decode('ascii')
        return vector.tolist()

    read = sum(map(len, inputs))
    return {
        'object': 'list',
        'data': [
            {'object': 'embedding', 'index': i, 'embedding': told(vector)}
            for i, vector in enumerate(vectors)
        ],
        'model': served.name,
        'usage': {'prompt_tokens': read, 'total_tokens': read},
    }


def scored_of(one: Logprob) -> Scored:
    return Scored(one.token, one.logprob, one.top)


def entries(spelling: Spelling, scored: Sequence[Scored]) -> list[Json]:
    def entry(token: int, logprob: float | None) -> Json:
        data = spelling.data(token)
        return {
            'token': spelling(token),
            'logprob': _finite(logprob),
            'bytes': list(data) if data else None,
        }

    return [
        {
            **entry(one.token, one.logprob),
            'top_logprobs': [entry(token, logprob) for token, logprob in one.top],
        }
        for one in scored
    ]


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; what is no number at all is told as the lowest too."""
    if logprob is None:
        return None
    return float(logprob) if logprob > _LOWEST else _LOWEST


class Spelling:
    r"""Tokens as strings: their text, `bytes:\xe4\xbd` where that is no whole characters; a control
    token by its name, which is no text and has no bytes."""

    def __init__(self, vocabulary: Vocabulary):
        self.data = vocabulary.token_bytes
        self._names = {token: name for name, token in vocabulary.control.items()}

    def __call__(self, token: int) -> str:
        data = self.data(token)
        if not data:
            return self._names.get(token, f'token:{token}')
        try:
            return data.decode('utf-8')
        except UnicodeDecodeError:
            return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)


def _offsets(vocabulary: Vocabulary, scored: Sequence[Scored], text: str, start: int) -> list[int]:
    """The character of the choice's text at which each token begins. A token that goes on with a
    character has the offset of that character."""
    pieces = [vocabulary.token_bytes(one.token) for one in scored]
    joined = b''.join(pieces)
    # Some tokenizers put a space before a text, which decoding takes away.
    lead = joined.startswith(b' ') and not text.startswith(' ')
    offsets, before = [], 0
    place = np.cumsum([(byte & 0xC0) != 0x80 for byte in joined]) if joined else np.zeros(0, int)
    for piece in pieces:
        begun = int(place[before - 1]) if before else 0  # characters that began before this token
        inside = before < len(joined) and (joined[before] & 0xC0) == 0x80
        offset = max(0, begun - bool(inside and begun) - lead)
        offsets.append(start + min(offset, len(text)))
        before += len(piece)
    return offsets

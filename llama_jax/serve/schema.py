"""Bodies of the three POST routes to what the engine is asked. Every field is used or refused."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

from llama_jax.engine.request import Request
from llama_jax.generate.controls import MOST_STOP_IDS, Controls, numbered
from llama_jax.serve import accepted
from llama_jax.serve.body import Fields, shown
from llama_jax.serve.constrain import grammar, wanted_format
from llama_jax.serve.controls import CONTROL_FIELDS, controls_of
from llama_jax.serve.errors import ApiError
from llama_jax.serve.messages import CONVERSATION_FIELDS, conversation_of
from llama_jax.serve.prompts import Prompt, chat_ids, prompts_of, source_of, suffix_of
from llama_jax.serve.served import Limits, Served
from llama_jax.serve.tools import NO_TOOLS, Tools, tools_of

_SHARED = CONTROL_FIELDS | {
    *('model', 'n', 'stream', 'stream_options', 'response_format', 'regex', 'timeout'),
}
COMPLETION_FIELDS = _SHARED | {'prompt', 'source', 'echo', 'suffix', 'best_of'}
CHAT_FIELDS = (
    _SHARED
    | CONVERSATION_FIELDS
    | {'messages', 'top_logprobs', 'max_completion_tokens', 'reasoning_effort'}
)
EMBEDDING_FIELDS = {'model', 'input', 'encoding_format', 'timeout'}

_COMPLETION_TOKENS = 16
"""max_tokens of a completion that names none, as at OpenAI; a chat goes on to the end."""

Kind = Literal['completion', 'chat']


@dataclass(frozen=True)
class Ask:
    """A checked body of a completion or chat."""

    kind: Kind
    prompts: tuple[Prompt, ...]
    n: int
    """Choices that are told of each prompt."""
    requests: tuple[Request, ...]
    """Request i continues prompt i // best_of."""
    best_of: int = 1
    """Choices that are drawn of each prompt."""
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    """Likeliest tokens to tell beside each; None: no log-probabilities at all."""
    prompt_logprobs: bool = False
    """The choice has a field for those of the prompt."""
    echo: bool = False
    tools: Tools = NO_TOOLS
    thinking: bool = False
    """The text begins within the thoughts of the model."""

    def prompt(self, request: int) -> Prompt:
        return self.prompts[request // self.best_of]


@dataclass(frozen=True)
class EmbeddingAsk:
    inputs: tuple[tuple[int, ...], ...]
    base64: bool
    deadline: float
    """Of time.monotonic()."""


def completion(served: Served, limits: Limits, body: Mapping[str, Any], owner: str) -> Ask:
    """Of a body for /v1/completions. May take long: text is tokenized, a grammar compiled."""
    fields = _fields(body, 'completion', COMPLETION_FIELDS)
    check_model(fields, served)
    n = _n(fields)
    best_of = _best_of(fields, n)
    source = source_of(fields, served)
    # A decoder with an encoder begins by itself, and null is the beginning of a document.
    alone = '' if source is not None or 'prompt' in body else None
    suffix = suffix_of(fields, served)
    prompts = tuple(
        prompts_of(fields, 'prompt', served, most=limits.choices, suffix=suffix, default=alone)
    )
    if len(prompts) * best_of > limits.choices:
        name = 'n' if best_of == n else 'best_of'
        many = f' for {len(prompts)} prompts' if len(prompts) > 1 else ''
        fields.bad(name, f'is {shown(best_of)}{many}: at most {limits.choices} in all')
    logprobs = None if fields.raw('logprobs') is False else fields.integer('logprobs', None)
    echo = fields.boolean('echo')
    asked = fields.integer('max_tokens', _COMPLETION_TOKENS)
    echoed = logprobs if echo else None
    if echo and asked == 0 and not fields.has('prompt_logprobs'):
        echoed = logprobs or 0  # an engine that draws nothing scores the prompt
    controls = controls_of(
        fields,
        served,
        limits,
        max_tokens=asked,
        logprobs=0 if logprobs is None and best_of > n else logprobs,  # they say which is best
        echoed=echoed,
    )
    if suffix and served.infill is not None:
        ends = tuple(dict.fromkeys((*controls.stop_ids, *served.infill.ends)))
        if len(ends) > MOST_STOP_IDS:
            fields.bad(
                'stop_token_ids',
                f'are {len(ends)} with those that end an infill: at most {MOST_STOP_IDS}',
            )
        controls = replace(controls, stop_ids=ends)
    for prompt in prompts:
        _fits(served, 'prompt', prompt.ids, controls.max_tokens)
    ids = [prompt.ids for prompt in prompts]
    return Ask(
        'completion',
        prompts,
        n,
        _requests(fields, served, limits, ids, best_of, controls, owner, source),
        best_of=best_of,
        logprobs=logprobs,
        prompt_logprobs=fields.has('prompt_logprobs'),
        echo=echo,
        **_streaming(fields),
    )


def chat(served: Served, limits: Limits, body: Mapping[str, Any], owner: str) -> Ask:
    """Of a body for /v1/chat/completions. May take long, like `completion`."""
    fields = _fields(body, 'chat', CHAT_FIELDS)
    check_model(fields, served)
    if served.chat is None:
        raise ApiError(
            400,
            f'{served.name} has no chat format: send text to /v1/completions',
            code='no_chat_format',
        )
    n = _n(fields)
    if n > limits.choices:
        fields.bad('n', f'is {shown(n)}: give at most {limits.choices}')
    tools = tools_of(fields, served.chat)
    conversation = conversation_of(fields, served.chat, tools)
    ids = chat_ids(fields, served, conversation)
    answers = conversation.add_generation_prompt  # else it goes on with a text
    logprobs = fields.integer('top_logprobs', None)
    if not fields.boolean('logprobs'):
        if logprobs:
            fields.bad('top_logprobs', 'is given without logprobs: set logprobs to true')
        logprobs = None
    else:
        logprobs = logprobs or 0
    room = served.engine.length - len(ids)
    name = 'max_completion_tokens' if fields.has('max_completion_tokens') else 'max_tokens'
    if fields.has('max_tokens') and fields.raw('max_tokens') != fields.raw(name):
        fields.bad('max_tokens', 'is given with max_completion_tokens: leave it out')
    max_tokens = fields.integer(name, max(1, room))
    controls = controls_of(
        fields, served, limits, max_tokens=max_tokens, logprobs=logprobs, echoed=None, chat=True
    )
    _fits(served, 'messages', ids, controls.max_tokens)
    return Ask(
        'chat',
        (Prompt(ids, None),),
        n,
        _requests(
            *(fields, served, limits, [ids], n, controls, owner),
            tools=tools,
            drop_space=answers and served.vocabulary.dummy_prefix,
        ),
        best_of=n,
        logprobs=logprobs,
        prompt_logprobs=fields.has('prompt_logprobs'),
        tools=tools,
        thinking=not tools.demanded and _thinks(served, ids),
        **_streaming(fields),
    )


def embeddings(served: Served, limits: Limits, body: Mapping[str, Any]) -> EmbeddingAsk:
    """Of a body for /v1/embeddings. A text is read as it is, without bos."""
    fields = _fields(body, 'embedding', EMBEDDING_FIELDS)
    check_model(fields, served)
    encoding = fields.text('encoding_format', 'float')
    if encoding not in ('float', 'base64'):
        fields.bad('encoding_format', f"is {shown(encoding)}: give 'float' or 'base64'")
    inputs = prompts_of(fields, 'input', served, most=limits.embeddings, begun=False)
    for prompt in inputs:
        _fits(served, 'input', prompt.ids, 0)
    deadline = _deadline(fields, limits)
    return EmbeddingAsk(tuple(prompt.ids for prompt in inputs), encoding == 'base64', deadline)


def _fields(body: Mapping[str, Any], kind: str, known: Set[str]) -> Fields:
    return Fields(
        body,
        known=known,
        unread=accepted.CHAT_UNREAD if kind == 'chat' else accepted.UNREAD,
        nothing=accepted.NOTHING_ASKED[kind],
        instead=accepted.INSTEAD,
    )


def check_model(fields: Fields, served: Served) -> None:
    """Raises ApiError for the name of another model."""
    name = fields.text('model', '') or served.name
    if name != served.name:
        raise ApiError(
            404,
            f'the model {shown(name)} is not served here: take {served.name!r}, or leave it out',
            param='model',
            code='model_not_found',
        )


def _n(fields: Fields) -> int:
    n = fields.integer('n', 1)
    if n < 1:
        fields.bad('n', f'is {shown(n)}: give 1 or more')
    return n


def _best_of(fields: Fields, n: int) -> int:
    best_of = fields.integer('best_of', n)
    if best_of < n:
        fields.bad('best_of', f'is {shown(best_of)}: give at least n, which is {n}')
    if best_of > n and fields.boolean('stream'):
        fields.bad('best_of', 'is above n, which cannot be streamed: leave it or stream out')
    return best_of


def _fits(served: Served, name: str, ids: tuple[int, ...], max_tokens: int) -> None:
    length = served.engine.length
    if len(ids) + max_tokens > length:
        wanted = f' and {shown(max_tokens)} to generate' if max_tokens else ''
        raise ApiError(
            400,
            f'{name} of {len(ids)} tokens{wanted}: at most {length} in all, shorten one of them',
            param=name,
            code='context_length_exceeded',
        )


def _requests(
    fields: Fields,
    served: Served,
    limits: Limits,
    prompts: list[tuple[int, ...]],
    n: int,
    controls: Controls,
    owner: str,
    source: tuple[int, ...] | None = None,
    tools: Tools = NO_TOOLS,
    drop_space: bool = False,
) -> tuple[Request, ...]:
    """For each prompt n requests, with one seed after the other: a prompt that is there several
    times goes on with the seeds. Where none was given, so do all prompts."""
    deadline = _deadline(fields, limits)
    control = served.vocabulary.control
    wanted = tools.wanted(control, wanted_format(fields))
    for name, given in (('min_tokens', controls.min_tokens), ('ignore_eos', controls.ignore_end)):
        if wanted and given:
            fields.bad(
                name, 'goes against the grammar, which says where the text ends: leave it out'
            )
    drawn = [prompt for prompt in prompts for _ in range(n)]
    alike = drawn if fields.has('seed') else [()] * len(drawn)
    return tuple(
        Request(
            prompt,
            one,
            source=source,
            grammar=grammar(served.make_grammar, wanted) if wanted else None,
            deadline=deadline,
            owner=owner,
            shown=tools.shown(control),
            drop_space=drop_space,
        )
        for prompt, one in zip(drawn, numbered(alike, [controls] * len(drawn)), strict=True)
    )


def _thinks(served: Served, ids: tuple[int, ...]) -> bool:
    """Whether a prompt ends where the model's thoughts begin."""
    return served.vocabulary.decode(ids[-8:]).rstrip().endswith('<think>')


def _deadline(fields: Fields, limits: Limits) -> float:
    """Of time.monotonic()."""
    seconds = fields.number('timeout', limits.seconds)
    if not 0 < seconds <= limits.seconds:
        fields.bad('timeout', f'is {seconds}: give seconds above 0, at most {limits.seconds:g}')
    return time.monotonic() + seconds


def _streaming(fields: Fields) -> dict[str, Any]:
    """Usage is told where there is no stream as well, so its option may stand there."""
    options = Fields(
        fields.object('stream_options') or {},
        known={'include_usage'},
        unread={'include_obfuscation'},  # padding against readers of encrypted streams
        nothing={'continuous_usage_stats': False},
        path='stream_options.',
    )
    return {
        'stream': fields.boolean('stream'),
        'include_usage': options.boolean('include_usage'),
    }

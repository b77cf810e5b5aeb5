"""Fields of a body that say how tokens are drawn, to the controls of the engine."""

from __future__ import annotations

import re
import secrets
import zlib
from dataclasses import replace

from llama_jax.errors import UserError
from llama_jax.generate.controls import Controls
from llama_jax.serve.body import Fields
from llama_jax.serve.errors import ApiError
from llama_jax.serve.served import Limits, Served

_NUMBERS = (
    *('temperature', 'top_p', 'min_p', 'typical_p', 'repetition_penalty'),
    *('presence_penalty', 'frequency_penalty'),
)
CONTROL_FIELDS = {
    *('max_tokens', 'min_tokens', 'top_k', 'seed', 'prompt_logprobs', 'logprobs'),
    *('stop', 'logit_bias', 'stop_token_ids', 'ignore_eos'),
    *_NUMBERS,
}
_LONGEST_MESSAGE = 300


def controls_of(
    fields: Fields,
    served: Served,
    limits: Limits,
    *,
    max_tokens: int,
    logprobs: int | None,
    echoed: int | None,
    chat: bool = False,
) -> Controls:
    """Of a body, checked; with the seed of its first choice. `echoed`: log-probabilities of the
    prompt, for its echo."""
    vocab = served.engine.config.ids
    scored = fields.integer('prompt_logprobs', None)
    if scored is not None and echoed is not None and scored != echoed:
        fields.bad('prompt_logprobs', 'differs from logprobs, which echo tells: give one of them')
    controls = Controls()
    numbers = {name: fields.number(name, getattr(controls, name)) for name in _NUMBERS}
    if numbers['top_p'] == 0:  # the likeliest token alone
        numbers |= {'top_p': 1.0, 'temperature': 0.0}
    top_k = fields.integer('top_k', 0)
    controls = replace(
        controls,
        max_tokens=max_tokens,
        min_tokens=fields.integer('min_tokens', 0),
        top_k=0 if top_k == -1 else top_k,
        seed=_seed(fields),
        logit_bias=fields.biases('logit_bias', vocab=vocab),
        stop=fields.texts('stop', most=limits.stop, longest=limits.stop_characters),
        stop_ids=fields.ids('stop_token_ids', vocab=vocab),
        ignore_end=fields.boolean('ignore_eos'),
        logprobs=logprobs,
        prompt_logprobs=scored if echoed is None else echoed,
        **numbers,
    )
    try:
        controls.check(vocab=vocab)
    except UserError as error:
        raise _renamed(str(error), fields, chat) from None
    return controls


def _seed(fields: Fields) -> int:
    """Of 32 bits, for one of 64; another one each time for none and for -1, by which clients of
    llama.cpp mean the same."""
    seed = fields.integer('seed', -1, below=2**64)
    if seed == -1:
        return secrets.randbits(32)
    if 0 <= seed < 2**32:
        return seed
    return zlib.crc32(seed.to_bytes(9, 'big', signed=True))


def _renamed(message: str, fields: Fields, chat: bool) -> ApiError:
    """What a control is called here stands before the message of its check."""
    names = {'stop_ids': 'stop_token_ids', 'ignore_end': 'ignore_eos'}
    if fields.has('max_completion_tokens'):
        names['max_tokens'] = 'max_completion_tokens'
    if chat:
        names['logprobs'] = 'top_logprobs'
    names |= {name: name for name in CONTROL_FIELDS - names.keys()}
    message = message[:_LONGEST_MESSAGE]
    for word in re.findall(r'\w+', message):
        if word in names:
            return ApiError(400, message.replace(word, names[word], 1), param=names[word])
    return ApiError(400, message)

"""Sampling controls: how a row draws its tokens, when it ends, and what is told of each. Plain
Python, no arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llama_jax.errors import UserError

MOST_LOGPROBS = 20
"""Likeliest tokens that are reported at a position, at most."""
MOST_STOP_IDS = 16
LARGEST = 2.0**63
"""Numbers are below this."""


@dataclass(frozen=True)
class Controls:
    """How one request draws its tokens, and when it ends. Each default turns its control off but
    `max_tokens`."""

    max_tokens: int = 128
    """0, with `prompt_logprobs`: the prompt is scored and nothing is drawn."""
    min_tokens: int = 0
    """No end id and no stop id is drawn before so many tokens, and no stop string ends in them."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens, and all that tie with the last of them; 0: off."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach probability p (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Only tokens at least so likely as this times the likeliest (Nguyen et al. 2024)."""
    typical_p: float = 1.0
    """Only the tokens whose information is nearest to the entropy that together reach probability p
    (Meister et al. 2023)."""
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt and the text: divided by it when positive, else multiplied
    (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the text holds."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the text holds it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits, by token id."""
    seed: int | None = None
    """In [0, 2^32). A draw depends on the row's logits, this and the position, nothing else. None:
    an Engine takes another one for each request, a Generator begins with 0."""
    stop_ids: tuple[int, ...] = ()
    """End the text like the end ids of the model; not part of it."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings, in which control tokens go by name."""
    ignore_end: bool = False
    """The end ids of the model do not end the text (for benchmarks)."""
    logprobs: int | None = None
    """Report each token's log-probability, and those of so many likeliest (0 to 20)."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, from the second one on."""

    def check(self, *, vocab: int) -> None:
        """Raise UserError for the first control that is out of range, by name."""
        scored = self.prompt_logprobs is not None
        for name, (right, what) in _RANGES.items():
            value = getattr(self, name)
            if name == 'max_tokens' and _is_integer(value) and value == 0 and scored:
                continue
            if name == 'seed' and value is None:
                continue
            if not (_is_number(value) and right(value)):
                raise UserError(f'{name} {value!r} is not {what}')
        for name in ('logprobs', 'prompt_logprobs'):
            value = getattr(self, name)
            if value is not None and not (_is_integer(value) and 0 <= value <= MOST_LOGPROBS):
                raise UserError(f'{name} {value!r} is not an integer from 0 to {MOST_LOGPROBS}')
        if self.min_tokens > self.max_tokens:
            raise UserError(
                f'min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}: lower it'
            )
        for token, bias in self.logit_bias.items():
            if not (_is_integer(token) and 0 <= token < vocab):
                raise UserError(f'logit_bias: token id {token!r} is outside the {vocab} ids')
            if not (_is_number(bias) and -100 <= bias <= 100):
                raise UserError(f'logit_bias of token {token}: {bias!r} is not within -100..100')
        for name in ('stop_ids', 'stop'):
            if not isinstance(getattr(self, name), tuple | list):
                raise UserError(f'{name} {getattr(self, name)!r} is no tuple: give one')
        for token in self.stop_ids:
            if not (_is_integer(token) and 0 <= token < vocab):
                raise UserError(f'stop_ids: token id {token!r} is outside the {vocab} ids')
        if len(self.stop_ids) > MOST_STOP_IDS:
            raise UserError(f'{len(self.stop_ids)} stop_ids: at most {MOST_STOP_IDS}')
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError('stop: give strings that are not empty')


def numbered(texts: Sequence[object], controls: Sequence[Controls]) -> list[Controls]:
    """Controls of rows with these texts (hashable), which are drawn once each: of a text that is
    there several times the seeds go on one by one, from 0 where there is none."""
    before: Counter[object] = Counter()
    found = []
    for text, one in zip(texts, controls, strict=True):
        found.append(replace(one, seed=((one.seed or 0) + before[text]) % 2**32))
        before[text] += 1
    return found


@dataclass(frozen=True)
class Logprob:
    """A token and how likely it was, from the logits as the model gives them (no temperature, no
    penalty, no bias)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, best first."""


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(-LARGEST < value < LARGEST)  # not of nan either


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    'max_tokens': (lambda n: _is_integer(n) and n >= 1, 'a positive integer'),
    'min_tokens': (lambda n: _is_integer(n) and n >= 0, '0 (off) or a positive integer'),
    'temperature': (lambda t: 0 <= t <= 1e6, '0 (greedy) or a positive number up to 1e6'),
    'top_k': (lambda k: _is_integer(k) and 0 <= k < 2**31, '0 (off) or a positive integer'),
    'top_p': (lambda p: 0 < p <= 1, 'in (0, 1]'),
    'min_p': (lambda p: 0 <= p <= 1, 'in [0, 1]'),
    'typical_p': (lambda p: 0 < p <= 1, 'in (0, 1]'),
    'repetition_penalty': (lambda r: 0.01 <= r <= 100, 'within 0.01..100'),
    'presence_penalty': (lambda p: -100 <= p <= 100, 'within -100..100'),
    'frequency_penalty': (lambda p: -100 <= p <= 100, 'within -100..100'),
    'seed': (lambda s: _is_integer(s) and 0 <= s < 2**32, 'an integer in [0, 2^32)'),
}

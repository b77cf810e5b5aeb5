"""How a trained objective is asked for likelihood and for text: in the form of its training.

Each objective says so in its own file, by `reading`. In every example weight is on the tokens that
are asked for, and on no mark around them, so that all objectives are asked for the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from llama_jax.data.pieces import Example

Kind = Literal['exact', 'bound', 'order', 'pseudo']
"""Of a likelihood. 'exact': log p of the text. 'bound': no more than it, in expectation (a NELBO).
'order': exact where the tokens are written in one order of several. 'pseudo': each token given all
others (Salazar et al. 2020), which is no likelihood."""


class Middle(NamedTuple):
    """A text in three parts, token ids int32; without a suffix its rest given its beginning."""

    prefix: np.ndarray
    middle: np.ndarray
    suffix: np.ndarray


Ask = Callable[[Middle, Any], Example]
"""(text, tokenizer) -> example with weight on the text's middle."""


class Question(NamedTuple):
    """How the log-likelihood of a middle is asked for."""

    kind: Kind
    examples: Callable[[Middle, Any, np.random.Generator], list[Example]]
    """(text, tokenizer, rng) -> examples of which the sum of weight x log p(target) is it."""
    sees_all: bool = False
    """Whether every position of these sees all of its example, and not what is before it."""
    draws: int = 1
    """Of a bound that is drawn by Monte Carlo, how often: the first so many-th of the examples are
    one draw, and so on, each weighted by 1 / draws."""
    read: Callable[..., jax.Array] | None = None
    """(model, batch, compute=) -> features [B, T, D], for an objective that says itself what a
    token sees. None: as TokenPrediction reads."""


class Unmasking(NamedTuple):
    """How the model writes by filling masks in."""

    read_previous: bool = False
    """A token is read off the position before it."""
    block: int = 0
    """Tokens of the blocks that are written after each other, counted from the begin token; each
    sees itself and those before it. 0: every token sees the whole text."""


class Infill(NamedTuple):
    """How a middle is written, token by token."""

    example: Ask
    ends: Literal['mark', 'suffix', 'length']
    """At a control token, where the suffix follows, or at as many tokens as were masked; the first
    two are written from left to right, the last the most certain token first."""
    first: Literal['prefix', 'suffix'] | None = None
    """The side that a decoder reads first, where control tokens stand before both of them."""
    sees_all: bool = False


class Reading(NamedTuple):
    """What an objective can be asked for; None is n/a."""

    whole: Question | None = None
    """A text from its first token on; its prefix is that token."""
    rest: Question | None = None
    """The rest of a text, which has no suffix, given its beginning."""
    middle: Question | None = None
    """A span given what is before it and, where the objective can see it, behind it."""
    infill: Infill | None = None
    """None also where `middle` does not see the suffix."""
    text: bool = True
    """Whether it teaches to continue a text from left to right."""
    begins: bool = True
    """Whether the texts that it is trained on begin with bos."""
    unmasks: Unmasking | None = None
    """How it writes in another order; see generate/diffusion.py."""


NOTHING = Reading()
"""Of an objective that gives text no likelihood."""


def asking(kind: Kind, ask: Ask, *, sees_all: bool = False) -> Question:
    """A question by one example."""
    return Question(kind, functools.partial(_one, ask), sees_all)


def _one(ask: Ask, text: Middle, tokenizer: Any, rng: np.random.Generator) -> list[Example]:
    return [ask(text, tokenizer)]


def weighted_at(
    inputs: np.ndarray, targets: np.ndarray, *, start: int, n: int, weights: Any = None, **more: Any
) -> Example:
    """An example with weight on `n` targets from `start` on alone."""
    place = np.arange(len(targets))
    weights = ((start <= place) & (place < start + n)).astype(np.float32)
    return {'inputs': inputs, 'targets': targets, 'weights': weights, **more}


def continued(text: Middle, tokenizer: Any) -> Example:
    """[begin, prefix, middle], from left to right."""
    ids = np.concatenate([[tokenizer.bos_id], text.prefix, text.middle]).astype(np.int32)
    return weighted_at(ids[:-1], ids[1:], start=len(text.prefix), n=len(text.middle))


def as_it_stands(text: Middle, tokenizer: Any) -> Example:
    """[prefix, middle], from left to right."""
    ids = np.concatenate([text.prefix, text.middle]).astype(np.int32)
    return weighted_at(ids[:-1], ids[1:], start=len(text.prefix) - 1, n=len(text.middle))


LEFT_TO_RIGHT = Reading(
    whole=asking('exact', as_it_stands),
    rest=asking('exact', continued),
    middle=asking('exact', continued),
)
"""Of a causal model; its middle is asked for without the suffix."""

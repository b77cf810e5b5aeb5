"""What a caller asks of an engine and what comes back: plain Python, no arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from llama_jax.generate.controls import Controls, Logprob

FinishReason = Literal['stop', 'length', 'cancelled', 'deadline', 'error']


class Grammar(Protocol):
    """What constrained output may say next; one object per row, made anew for each request. An
    exception of its methods ends the request with reason 'error', and its message."""

    def mask(self) -> np.ndarray:
        """Tokens that may come next, bool [V]; an end id is among them where the text may end."""

    def accept(self, token: int) -> None:
        """`token` was drawn."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    controls: Controls = field(default_factory=Controls)
    source: Sequence[int] | None = None
    """Token ids that the encoder reads; an encoder-decoder needs it."""
    grammar: Grammar | None = None
    """Only text that it allows."""
    deadline: float | None = None
    """`time.monotonic()` at which the request is cut off, waiting or running."""
    owner: str = ''
    """Whose request it is: owners take turns at free rows."""
    shown: Mapping[int, bytes] = field(default_factory=dict)
    """Control tokens that are spelled in the text, such as those around calls of tools."""
    drop_space: bool = False
    """The text is one of its own, as an answer is: a space that begins it is the tokenizer's."""


@dataclass(frozen=True)
class Piece:
    """Text that is complete, and the tokens that arrived with it."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    """One per token, where asked for."""


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the prompt, where asked for; arrives before the first piece."""

    logprobs: tuple[Logprob, ...]
    """Of its second token, its third, and so on."""


@dataclass(frozen=True)
class Finish:
    """The last event of every request."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    """All that were drawn and kept, the end id not counted."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not read again, because a row held them."""
    message: str = ''
    """What went wrong, for 'error'."""
    end: Logprob | None = None
    """The end id, or stop id, that was drawn, where log-probabilities are asked for."""


Event = Piece | PromptScores | Finish
OnEvent = Callable[[Event], None]
"""Called from the engine's thread; must return at once."""


class QueueFullError(Exception):
    """The queue is full: try again later."""

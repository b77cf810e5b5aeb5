"""What a server serves, and what it asks of its parts: interfaces without HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from llama_jax.engine.request import Grammar, OnEvent, Request
from llama_jax.text.chat import ChatFormat
from llama_jax.text.infill import Infill
from llama_jax.text.vocabulary import Vocabulary

MakeGrammar = Callable[[Mapping[str, Any]], Grammar]
"""A new grammar for `{'type': 'json_object'}`, `{'type': 'json_schema', 'schema': {...}}`,
`{'type': 'regex', 'regex': '...'}` or the calls of `Tools.wanted`. Raises UserError for a schema or
a pattern it cannot hold."""


class Ticket(Protocol):
    def cancel(self) -> None:
        """May be called twice, and after the end; a Finish follows where there was none."""


class Shape(Protocol):
    @property
    def vocab(self) -> int:
        """Rows of the embedding."""

    @property
    def ids(self) -> int:
        """Ids that the model knows."""


class EngineLike(Protocol):
    """What the server needs of an engine; all methods may be called from any thread."""

    @property
    def config(self) -> Shape:
        """Of the model."""

    @property
    def length(self) -> int:
        """Longest prompt and output together."""

    @property
    def alive(self) -> bool:
        """It takes requests."""

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Returns at once. Raises UserError for a request that cannot be met, QueueFullError."""

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Float32 [n, D] of unit length."""

    def stats(self) -> Any:
        """A dataclass of numbers and of dicts of numbers."""

    def close(self) -> None:
        """Cancel what runs, and end. May be called twice."""


@dataclass(frozen=True)
class Served:
    """One model, ready."""

    name: str
    engine: EngineLike
    vocabulary: Vocabulary
    begin: tuple[int, ...] = ()
    """Ids before every prompt that is given as text (bos, where the model was trained with it)."""
    chat: ChatFormat | None = None
    make_grammar: MakeGrammar | None = None
    read_source: Callable[[str], Sequence[int]] | None = None
    """Text for the encoder to token ids; None: the model has no encoder. Raises UserError, and may
    raise TooLongError for more than `source_length`."""
    source_length: int = 0
    """Tokens of the longest source."""
    infill: Infill | None = None
    """How the model is asked for the text before a suffix; None: it was not trained to."""
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Limits:
    """What one HTTP request may ask for."""

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    """Until the whole body is there."""
    choices: int = 64
    """Prompts times n."""
    embeddings: int = 256
    """Texts of one request for embeddings."""
    embeddings_waiting: int = 16
    """Requests for embeddings, after which more are told to come back."""
    grammar_seconds: float = 10.0
    """To compile a grammar."""
    stop: int = 16
    stop_characters: int = 256
    seconds: float = 600.0
    """The longest `timeout`, and that of requests which name none."""

"""What a server serves, and what it asks of its parts: interfaces without HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from llama_jax.generate.request import Grammar, OnEvent, Request

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""
MakeGrammar = Callable[[Mapping[str, Any]], Grammar]
"""A new grammar for `{'type': 'json_object'}`, `{'type': 'json_schema', 'schema': {...}}` or
`{'type': 'regex', 'regex': '...'}`. Raises UserError for a schema or a pattern it cannot hold."""


class Ticket(Protocol):
    def cancel(self) -> None:
        """May be called twice, and after the end; a Finish follows where there was none."""


class Shape(Protocol):
    @property
    def vocab(self) -> int: ...


class EngineLike(Protocol):
    """What the server needs of an engine; all methods may be called from any thread."""

    @property
    def config(self) -> Shape: ...
    @property
    def length(self) -> int:
        """Longest prompt and output together."""

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Returns at once. Raises UserError for a request that cannot be met, QueueFullError."""

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Float32 [n, D] of unit length."""

    def stats(self) -> Any:
        """A dataclass of numbers and of dicts of numbers."""

    def close(self) -> None: ...


class Vocabulary(Protocol):
    @property
    def bos_id(self) -> int | None: ...
    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 that a token stands for, perhaps a part of a character; b'' if none."""


class ChatFormat(Protocol):
    def encode(self, messages: Sequence[Message], vocabulary: Any) -> Sequence[int]:
        """The prompt that asks for the assistant's next message."""


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
    stop: int = 16
    stop_characters: int = 256
    seconds: float = 600.0
    """The longest `timeout`, and that of requests which name none."""

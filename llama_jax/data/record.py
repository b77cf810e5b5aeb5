"""The records that objectives read: what a source yields, by type.

An objective names the type that it `reads`; a source that yields another one is refused by name.
Files as people have them (messages, ShareGPT, Alpaca, prompt and completion, pairs of answers, text
and label, queries and passages) become records in data/schemas.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_jax.text.chat import Message

Prompt = str | tuple[Message, ...]
"""Plain text, which no template changes, or the messages of a chat."""


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, and the name of its class."""

    text: str
    label: str
    other: str | None = None
    """The second text of a pair (hypothesis, answer)."""


@dataclass(frozen=True)
class Pair:
    """A text to write, given another: translation, summary, completion of a prompt."""

    source: str
    target: str


@dataclass(frozen=True)
class Chat:
    """Messages, of which the assistant's are learnt."""

    messages: tuple[Message, ...]
    weights: tuple[float, ...]
    """Loss weight of each message's tokens: 1 for the assistant's and 0 for others', where the data
    says nothing else."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the assistant may call, by their JSON schemas."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is the better one."""

    prompt: Prompt
    chosen: Prompt
    """Of the kind of `prompt`: what comes after it."""
    rejected: Prompt
    margin: float = 0.0
    """How much better it is, where somebody said so (Llama 2, section 3.2.2)."""


@dataclass(frozen=True)
class Problem:
    """A prompt with an answer that a function can verify."""

    prompt: Prompt
    answer: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the record has, for the function to see."""


@dataclass(frozen=True)
class QueryPassages:
    """A query, passages that answer it, and others that look as if they did."""

    query: str
    positives: tuple[str, ...]
    """One or more, each of which is right."""
    negatives: tuple[str, ...] = ()
    """Hard negatives, none of them among the positives."""


Record = Text | Labelled | Pair | Chat | Preference | Problem | QueryPassages


class BadRecordError(ValueError):
    """What is wrong with one record: a field, and the problem in words. Whoever reads the file adds
    its name and the line."""

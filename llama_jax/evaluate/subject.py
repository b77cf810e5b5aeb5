"""A model as tasks ask it: text in, log-probabilities, text or vectors out."""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Event, Finish, Piece
from llama_jax.engine.request import Request as ToWrite
from llama_jax.engine.sequence import SequenceState
from llama_jax.errors import UserError
from llama_jax.evaluate.classifier import Classifier
from llama_jax.generate.continuations import Continuations, Request, Scored
from llama_jax.generate.controls import Controls, numbered
from llama_jax.generate.embed import Embedder
from llama_jax.generate.finite import NotFiniteError
from llama_jax.generate.generator import Generator
from llama_jax.generate.programs import Programs, bucket
from llama_jax.mesh import batch_shards
from llama_jax.text.chat import ChatFormat, Conversation, Message
from llama_jax.text.vocabulary import Vocabulary, encode_spelled

ROWS = 8
"""Texts that are written at a time, for each shard of the batch."""


@dataclass(frozen=True)
class Written:
    """What the model wrote."""

    text: str
    reason: str
    """'stop' or 'length'."""


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    name: str
    programs: Programs
    vocabulary: Vocabulary
    begin: tuple[int, ...] = ()
    """Ids in front of every text, where the model was trained with them."""
    chat: ChatFormat | None = None
    classifier: Classifier | None = None
    """Of a run of Classification."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What stands before a 'query' and a 'document' that are read for their vectors, where the
    model was trained with it."""
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def context(self) -> int:
        """Tokens that the model reads at once."""
        return self.programs.config.context

    @property
    def prefix_id(self) -> int:
        """What stands in front of a text from its first token on: bos, or else eos."""
        if self.begin:
            return self.begin[-1]
        bos_id = self.vocabulary.bos_id
        usable = bos_id is not None and bos_id < self.programs.config.ids
        return bos_id if usable and bos_id is not None else self.vocabulary.eos_id

    def encode(self, text: str, *, special: bool = False, begin: bool = True) -> list[int]:
        """Token ids of a text, after the ids that begin one. With `special` what spells a control
        token is one, as the tokenizers of transformers read it; a text that spells the begin token
        itself then gets no other."""
        ids = (
            encode_spelled(self.vocabulary, text)
            if special
            else self.vocabulary.encode(text).tolist()
        )
        own = tuple(ids[: len(self.begin)]) == self.begin
        return ids if own or not begin else [*self.begin, *ids]

    def asked(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, up to where the assistant answers. Raises UserError where the model
        has no chat format."""
        if self.chat is None:
            raise UserError(f'{self.name} has no chat format: leave chat out of the task')
        return self.chat.encode(Conversation(messages), self.vocabulary, begin=self.begin)

    def pair(self, context: str, continuation: str, *, special: bool = False) -> Request:
        """Token ids of a context and what goes on from it, as lm-eval cuts them: white space at the
        end of the context belongs to the continuation, and both are encoded as one text.

        Where a token spans the cut, lm-eval would score a part of the continuation, or none of it;
        here the continuation is then encoded by itself. An empty context is `prefix_id`.
        """
        if not context:
            ids = self.encode(continuation, special=special, begin=False)
            return Request([self.prefix_id], ids if ids[:1] != [self.prefix_id] else ids[1:])
        stripped = context.rstrip()
        if stripped:
            context, continuation = stripped, context[len(stripped) :] + continuation
        before = self.encode(context, special=special)
        whole = self.encode(context + continuation, special=special)
        if len(whole) > len(before) and whole[: len(before)] == before:
            return Request(before, whole[len(before) :])
        if special:
            return Request(before, encode_spelled(self.vocabulary, continuation, continues=True))
        return Request(before, self.vocabulary.encode(continuation, continues=True).tolist())

    def score(
        self,
        requests: Sequence[Request],
        *,
        shared: bool = True,
        tell: Callable[[int], None] = lambda n: None,
    ) -> list[Scored]:
        """Log-probabilities; see Continuations."""
        return self._once('score', lambda: Continuations(self.programs))(
            requests, shared=shared, tell=tell
        )

    def vectors(self, texts: Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Float32 [n, D] of unit length. Raises UserError for a text longer than the context,
        unless it is to be cut."""
        rows = [self.encode(text) or [self.prefix_id] for text in texts]
        if truncate:
            rows = [row[: self.context] for row in rows]
        return self._once('embed', lambda: Embedder(self.programs))(rows)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        controls: Sequence[Controls],
        tell: Callable[[int], None] = lambda n: None,
    ) -> list[Written]:
        """Continue each prompt; what prompts share is read once. One that is there several times is
        continued in several ways, where tokens are drawn. Raises UserError for prompts that leave
        no room in the context, NotFiniteError where the model computes no numbers."""
        if not prompts:
            return []
        controls = numbered([tuple(prompt) for prompt in prompts], controls)
        longest = max(len(p) + c.max_tokens for p, c in zip(prompts, controls, strict=True))
        if longest > self.context:
            raise UserError(f'{longest} tokens to read and write, the context is {self.context}')
        # Those that begin alike after each other: a row that was read goes on from there.
        order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
        length = min(bucket(longest), self.context)
        if batch_shards(self.programs.mesh) > 1:
            written = self._in_batches([(prompts[i], controls[i]) for i in order], tell)
        else:
            written = self._by_engine([(prompts[i], controls[i]) for i in order], length, tell)
        found = dict(zip(order, written, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _in_batches(
        self, asked: Sequence[tuple[Sequence[int], Controls]], tell: Callable[[int], None]
    ) -> list[Written]:
        """Rows over all devices; what a text has behind its stop string is written in vain."""
        found = []
        generator = self._once('generator', lambda: Generator.of(self.programs))
        rows = ROWS * batch_shards(self.programs.mesh)
        for start in range(0, len(asked), rows):
            part = asked[start : start + rows]
            each = {
                name: [getattr(c, name) for _, c in part]
                for name in Controls.__dataclass_fields__
                if name not in ('stop', 'prompt_logprobs', 'logprobs')
            }
            completions = generator([prompt for prompt, _ in part], **each)
            for (prompt, c), completion in zip(part, completions, strict=True):
                tell(len(completion.tokens))
                heard: list[Event] = []
                sequence = SequenceState(
                    ToWrite(prompt, c),
                    heard.append,
                    token_bytes=self.vocabulary.token_bytes,
                    end_ids=(),
                    names={token: name for name, token in self.vocabulary.control.items()},
                )
                sequence.add(completion.tokens)
                sequence.finish(completion.finish_reason)
                text = ''.join(event.text for event in heard if isinstance(event, Piece))
                assert isinstance(heard[-1], Finish)
                found.append(Written(text, heard[-1].reason))
        return found

    def _by_engine(
        self,
        asked: Sequence[tuple[Sequence[int], Controls]],
        length: int,
        tell: Callable[[int], None],
    ) -> list[Written]:
        engine = Engine(
            self.programs,
            token_bytes=self.vocabulary.token_bytes,
            control=self.vocabulary.control,
            rows=min(ROWS, len(asked)),
            length=length,
            queue=2 * len(asked),  # one owner may not fill it
        )
        texts: list[list[str]] = [[] for _ in asked]
        ends: queue.Queue[tuple[int, Finish]] = queue.Queue()

        def on(i: int, event: object) -> None:
            if isinstance(event, Piece):
                texts[i].append(event.text)
            elif isinstance(event, Finish):
                ends.put((i, event))

        reasons = {}
        try:
            for i, (prompt, c) in enumerate(asked):
                engine.submit(ToWrite(list(prompt), c), functools.partial(on, i))
            for _ in asked:
                i, end = ends.get()
                tell(end.completion_tokens)
                if end.reason == 'error':
                    raise NotFiniteError(end.message)
                reasons[i] = end.reason
        finally:
            engine.close()
        return [Written(''.join(texts[i]), reasons[i]) for i in range(len(asked))]

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

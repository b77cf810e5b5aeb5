"""An engine without a model: a thread that replays tokens by a script, as many rows at a time as it
has. It keeps the contract of the real one, so the server cannot tell."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llama_jax.engine.request import Finish, OnEvent, Piece, PromptScores, QueueFullError, Request
from llama_jax.errors import UserError
from llama_jax.generate.controls import Logprob
from llama_jax.serve.served import Limits, Served
from llama_jax.text.detokenizer import Detokenizer
from llama_jax.text.vocabulary import TooLongError

BOS, EOS, PAD, VOCAB = 256, 257, 258, 259
MODEL = 'fake/bytes'


class Bytes:
    """A vocabulary of bytes, and three ids that spell nothing."""

    bos_id, eos_id, pad_id, end_ids, vocab_size = BOS, EOS, PAD, (EOS,), VOCAB
    dummy_prefix, space_after_control = False, True
    takes_space: dict[int, tuple[bool, bool]] = {}
    control = {'<s>': BOS, '</s>': EOS}

    def encode(self, text: str, *, continues: bool = False, most=None) -> np.ndarray:
        if most is not None and len(text.encode(errors='replace')) > most:
            raise TooLongError(f'the text has more than {most} tokens')
        try:
            return np.array(list(text.encode()), np.int32)
        except UnicodeEncodeError:
            raise UserError('the text holds a lone surrogate: drop it') from None

    def decode(self, ids: Iterable[int]) -> str:
        return b''.join(map(self.token_bytes, ids)).decode(errors='replace')

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b''


class Turns:
    """A chat format: one line a message."""

    def knows(self, word) -> bool:
        return word != 'developer'

    def encode(self, conversation, vocabulary, *, begin=()) -> list[int]:
        if conversation.messages[-1]['role'] == 'nobody':
            raise UserError('the chat template refuses: nobody')
        said = conversation.joined().messages
        text = ''.join(f'{m["role"]}: {m["content"]}\n' for m in said)
        for name in ('tools', 'documents', 'variables'):
            if getattr(conversation, name):
                text += f'{name} {getattr(conversation, name)}\n'
        if conversation.continue_final_message:
            text = text.rstrip('\n')
        if conversation.add_generation_prompt:
            text += 'assistant: '
        return [*begin, *vocabulary.encode(text).tolist()]


def again(request: Request) -> Iterable[int]:
    """The default script: the prompt, over and over."""
    return itertools.cycle([t for t in request.prompt if t < 256] or [32])


def says(text: str) -> Callable[[Request], Iterable[int]]:
    """A script: this text, then the end."""
    return lambda request: [*text.encode(), EOS]


@dataclass(frozen=True)
class Config:
    vocab: int = VOCAB
    ids: int = VOCAB
    context: int = 4096


@dataclass(frozen=True)
class Stats:
    rows: int
    rows_busy: int
    waiting: int
    requests_total: dict[str, int]
    prompt_tokens_total: int
    cached_tokens_total: int
    generated_tokens_total: int
    uptime_seconds: float


@dataclass
class Row:
    request: Request
    on_event: OnEvent
    script: Iterable[int]
    text: Detokenizer
    cancelled: bool = False
    drawn: int = 0
    held: str = ''
    tokens: list[int] = field(default_factory=list)

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngine:
    def __init__(self, *, rows=4, length=512, queue=64, pause=0.0, script=again):
        self.config, self.rows, self.length, self.pause = Config(), rows, length, pause
        self.script, self._queue, self._begin = script, queue, time.monotonic()
        self.requests: list[Request] = []  # all that were ever taken
        self._waiting: deque[Row] = deque()
        self._busy: list[Row] = []
        self._count: Counter[str] = Counter()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: OnEvent) -> Row:
        request.controls.check(vocab=VOCAB)
        if len(request.prompt) + request.controls.max_tokens > self.length:
            raise UserError('prompt and max_tokens are too long')
        row = Row(
            request,
            on_event,
            iter(self.script(request)),
            Detokenizer(
                lambda i: request.shown.get(i) or Bytes().token_bytes(i),
                drop_space=request.drop_space,
            ),
        )
        with self._wake:
            if self._closed or len(self._waiting) >= self._queue:
                raise QueueFullError(f'{len(self._waiting)} requests are waiting')
            self.requests.append(request)
            self._waiting.append(row)
            self._wake.notify()
        return row

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        vectors = np.array([np.bincount(p, minlength=VOCAB) + 1.0 for p in prompts], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    @property
    def alive(self) -> bool:
        return not self._closed

    def stats(self) -> Stats:
        with self._wake:
            reasons = {k: v for k, v in self._count.items() if not k.endswith('tokens')}
            return Stats(
                self.rows,
                len(self._busy),
                len(self._waiting),
                reasons,
                self._count['prompt_tokens'],
                0,
                self._count['tokens'],
                time.monotonic() - self._begin,
            )

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether all rows are free, by then."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            stats = self.stats()
            if not stats.rows_busy and not stats.waiting:
                return True
            time.sleep(0.01)
        return False

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._waiting or self._busy):
                    self._wake.wait()
                if self._closed:
                    for row in (*self._busy, *self._waiting):
                        self._end(row, 'cancelled')
                    return
                gone = [r for r in self._waiting if self._over(r)]
                for row in gone:
                    self._waiting.remove(row)
                fresh = []
                while self._waiting and len(self._busy) < self.rows:
                    fresh.append(self._waiting.popleft())
                    self._busy.append(fresh[-1])
                busy = list(self._busy)
            for row in gone:
                self._end(row, self._over(row))
            for row in fresh:
                self._count['prompt_tokens'] += len(row.request.prompt)
                self._scores(row)
            ended = [row for row in busy if self._step(row)]
            with self._wake:
                self._busy = [row for row in self._busy if not any(row is e for e in ended)]
            time.sleep(self.pause)

    def _over(self, row: Row) -> str:
        if row.cancelled:
            return 'cancelled'
        late = row.request.deadline is not None and time.monotonic() > row.request.deadline
        return 'deadline' if late else ''

    def _scores(self, row: Row) -> None:
        top = row.request.controls.prompt_logprobs
        if top is not None:
            scores = tuple(logprob(t, top) for t in row.request.prompt[1:])
            row.on_event(PromptScores(scores))

    def _step(self, row: Row) -> bool:
        """One token; whether it was the last."""
        controls = row.request.controls
        over = self._over(row)
        if over:
            self._end(row, over)
            return True
        if not controls.max_tokens:
            self._end(row, 'length')
            return True
        token = next(row.script, EOS)
        if token in controls.stop_ids or (token == EOS and not controls.ignore_end):
            self._piece(row, row.held)
            top = controls.logprobs
            self._end(row, 'stop', end=None if top is None else logprob(token, top))
            return True
        row.drawn += 1
        self._count['tokens'] += 1
        row.tokens.append(token)
        row.held += row.text([token])
        places = [place for stop in controls.stop if (place := row.held.find(stop)) >= 0]
        if places:
            self._piece(row, row.held[: min(places)])
            self._end(row, 'stop')
            return True
        if row.drawn == controls.max_tokens:
            self._piece(row, row.held)
            self._end(row, 'length')
            return True
        begun = (s[:n] for s in controls.stop for n in range(1, len(s)))
        if row.held and not any(row.held.endswith(start) for start in begun):
            self._piece(row, row.held)
        return False

    def _piece(self, row: Row, text: str) -> None:
        top = row.request.controls.logprobs
        told = () if top is None else tuple(logprob(t, top) for t in row.tokens)
        if text or row.tokens:
            row.on_event(Piece(text, tuple(row.tokens), told))
        row.held, row.tokens = '', []

    def _end(self, row: Row, reason: str, end: Logprob | None = None) -> None:
        self._count[reason] += 1
        message = 'the script says so' if reason == 'error' else ''
        row.on_event(Finish(reason, len(row.request.prompt), row.drawn, 0, message, end))


def logprob(token: int, top: int) -> Logprob:
    """Any numbers, the same ones for a token each time."""
    others = [(token, -0.25), *((other, -1.0 - other / 100) for other in range(65, 65 + top))]
    return Logprob(token, -0.25, tuple(others[:top]))


def served(engine: FakeEngine, **parts) -> Served:
    return Served(MODEL, engine, Bytes(), **{'begin': (BOS,), 'chat': Turns(), **parts})


SMALL = Limits(body_bytes=20_000, body_seconds=0.3, choices=8, embeddings=8)

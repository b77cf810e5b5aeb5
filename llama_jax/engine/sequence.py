"""One request while it is generated, on the host: its tokens, its text, its events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_jax.engine.request import (
    Event,
    Finish,
    FinishReason,
    OnEvent,
    Piece,
    PromptScores,
    Request,
)
from llama_jax.generate.controls import Logprob
from llama_jax.text.detokenizer import Detokenizer

log = logging.getLogger(__name__)


class StopStrings:
    """Cuts a text before the first of several strings, as the text arrives.

    What may be the beginning of one is held back until it is known.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = tuple(stop), ''
        self.found = False

    def __call__(self, text: str) -> str:
        """The text that is sure to stand before every string, after `text` more."""
        if not self._stop:
            return text
        text, self._held = self._held + text, ''
        at = min((i for i in map(text.find, self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.found = True
            return text[:at]
        n_held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """What was held back: no string came of it."""
        held, self._held = self._held, ''
        return held


class SequenceState:
    """A request from its submission to its end. Not thread-safe: the engine's thread owns it, but
    for `cancelled`, which any thread may set."""

    def __init__(
        self,
        request: Request,
        on_event: OnEvent,
        *,
        token_bytes: Callable[[int], bytes],
        end_ids: Sequence[int],
    ):
        controls = request.controls
        self.request, self.controls, self._on_event = request, controls, on_event
        self.prompt = tuple(map(int, request.prompt))
        self.cancelled = self.finished = False
        self.slot = -1
        """Its slot of the KV cache, once it has one."""
        self.n_read = self.n_cached = 0
        """Tokens of the prompt in the cache, and how many of them were there before."""
        self.scores: list[Logprob] = []
        """Of the prompt as far as it is read, where asked for."""
        self._ends = {*(() if controls.ignore_end else end_ids), *controls.stop_ids}
        self._n_drawn = 0
        shown = request.shown
        self._text = Detokenizer(
            lambda token: shown.get(token) or token_bytes(token), prompt=self.prompt
        )
        self._stop = StopStrings(controls.stop)
        self._tokens: list[int] = []  # whose text is not out yet
        self._logprobs: list[Logprob] = []

    @property
    def limit(self) -> int:
        """How long prompt and text may become."""
        return len(self.prompt) + self.controls.max_tokens

    @property
    def owner(self) -> str:
        """Whose request it is."""
        return self.request.owner

    def expired(self, now: float) -> bool:
        """Past its deadline."""
        return self.request.deadline is not None and now >= self.request.deadline

    def tell_scores(self) -> None:
        """Log-probabilities of the whole prompt are known."""
        self._tell(PromptScores(tuple(self.scores)))

    def add(self, tokens: Sequence[int], logprobs: Sequence[Logprob] = ()) -> int:
        """Take tokens that were drawn, up to the end of the text; how many were kept."""
        text, n_kept = '', 0
        reason: FinishReason | None = None
        for i, token in enumerate(tokens):
            if token in self._ends:
                reason = 'stop'
                break
            n_kept += 1
            self._n_drawn += 1
            self._tokens.append(token)
            self._logprobs.extend(logprobs[i : i + 1])
            text += self._stop(self._text([token]))
            if self._stop.found:
                reason = 'stop'
                break
            if self._n_drawn == self.controls.max_tokens:
                reason = 'length'
                break
        if reason:
            self.finish(reason, text=text)
        elif text:
            self._tell_piece(text)
        return n_kept

    def finish(self, reason: FinishReason, message: str = '', *, text: str = '') -> None:
        """The last events, `text` and what was held back among them; a second call does nothing."""
        if self.finished:
            return
        self.finished = True
        if not self._stop.found:
            text += self._stop.finish()
        if text or self._tokens:
            self._tell_piece(text)
        n_prompt = len(self.prompt)
        self._tell(Finish(reason, n_prompt, self._n_drawn, self.n_cached, message))

    def _tell_piece(self, text: str) -> None:
        self._tell(Piece(text, tuple(self._tokens), tuple(self._logprobs)))
        self._tokens, self._logprobs = [], []

    def _tell(self, event: Event) -> None:
        """Whoever does not want to hear ends its own request, and no other."""
        try:
            self._on_event(event)
        except Exception:
            if not self.cancelled:
                log.exception('on_event of a request failed: the request is cancelled')
            self.cancelled = True


@dataclass(frozen=True)
class Ticket:
    """A request that was taken."""

    _sequence: SequenceState
    _wake: Callable[[], None]

    def cancel(self) -> None:
        """Stop it, soon; its last event is Finish('cancelled') unless it has ended before."""
        self._sequence.cancelled = True
        self._wake()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` goes on from."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)

"""One request while it is generated, on the host: its tokens, its text, its events."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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

    What may be the beginning of one is held back until it is known. Names of control tokens are
    looked at, and are no part of the text.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = tuple(stop), ''
        self._is_name: list[bool] = []  # each character that is held
        self.found = False

    def __call__(self, text: str, *, is_name: bool = False, may_stop: bool = True) -> str:
        """The text that is sure to stand before every string, after `text` more. Without `may_stop`
        a string that ends in it is none."""
        if not self._stop:
            return '' if is_name else text
        n_before = len(self._held)
        self._held += text
        self._is_name += [is_name] * len(text)
        if may_stop:
            # A string that ended before did not count.
            begins = [max(0, n_before - len(stop) + 1) for stop in self._stop]
            found = [self._held.find(*pair) for pair in zip(self._stop, begins, strict=True)]
            at = min((i for i in found if i >= 0), default=-1)
            if at >= 0:
                self.found = True
                return self._passed(at)
        n_held = max(_overlap(self._held, stop) for stop in self._stop)
        return self._passed(len(self._held) - n_held)

    def finish(self) -> str:
        """What was held back: no string came of it."""
        return self._passed(len(self._held))

    def _passed(self, n: int) -> str:
        passed = zip(self._held[:n], self._is_name[:n], strict=True)
        text = ''.join(character for character, is_name in passed if not is_name)
        self._held, self._is_name = self._held[n:], self._is_name[n:]
        return text


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
        names: Mapping[int, str],
    ):
        """`names` are those of the control tokens."""
        controls = request.controls
        if controls.seed is None:
            controls = replace(controls, seed=secrets.randbits(32))
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
            lambda token: shown.get(token) or token_bytes(token),
            prompt=self.prompt,
            drop_space=request.drop_space,
        )
        self._stop = StopStrings(controls.stop)
        # A string stops at a control token that it names whole, and at no part of a name.
        self._names = {i: n for i, n in names.items() if any(n in stop for stop in controls.stop)}
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
        end: Logprob | None = None
        for i, token in enumerate(tokens):
            if token in self._ends:
                reason = 'stop'
                end = next(iter(logprobs[i : i + 1]), None)
                break
            n_kept += 1
            self._n_drawn += 1
            self._tokens.append(token)
            self._logprobs.extend(logprobs[i : i + 1])
            text += self._shown(token)
            if self._stop.found:
                reason = 'stop'
                break
            if self._n_drawn == self.controls.max_tokens:
                reason = 'length'
                break
        if reason:
            self.finish(reason, text=text, end=end)
        elif text:
            self._tell_piece(text)
        return n_kept

    def _shown(self, token: int) -> str:
        """The text that is sure after one more token."""
        may_stop = self._n_drawn > self.controls.min_tokens
        text = self._stop(self._text([token]), may_stop=may_stop)
        if token in self._names and token not in self.request.shown and not self._stop.found:
            text += self._stop(self._names[token], is_name=True, may_stop=may_stop)
        return text

    def finish(
        self,
        reason: FinishReason,
        message: str = '',
        *,
        text: str = '',
        end: Logprob | None = None,
    ) -> None:
        """The last events, `text` and what was held back among them; a second call does nothing."""
        if self.finished:
            return
        self.finished = True
        if not self._stop.found:
            text += self._stop.finish()
        if text or self._tokens:
            self._tell_piece(text)
        n_prompt = len(self.prompt)
        self._tell(Finish(reason, n_prompt, self._n_drawn, self.n_cached, message, end))

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

"""The turns of an engine: the device gets its work, and the host hands out what is there."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass

import jax
import numpy as np

from llama_jax.engine.request import FinishReason
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sequence import SequenceState
from llama_jax.engine.slots import Slots
from llama_jax.generate.decode import Drawn
from llama_jax.generate.finite import NOT_FINITE, NotFiniteError
from llama_jax.generate.generator import logprobs_of
from llama_jax.generate.programs import Programs
from llama_jax.generate.speculative.verify import Counts


@dataclass
class _Flight:
    """Tokens that the device is drawing, and for whom."""

    drawn: Drawn
    sequence_of: dict[int, SequenceState]
    """By row of `drawn`."""
    n_tokens: int
    """Of each row, where nothing was guessed."""
    counts: Counts | None = None
    """Else so many as are counted here."""


class Core:
    """Runs the sequences of a scheduler in slots. It belongs to one thread.

    Attributes:
        totals: counts since it was made, see Stats.
    """

    def __init__(
        self, programs: Programs, slots: Slots, scheduler: Scheduler, lock: threading.Condition
    ):
        """`lock` is held where `scheduler.waiting` is used."""
        self._programs, self._slots, self._scheduler = programs, slots, scheduler
        self._lock = lock
        self._flights: deque[_Flight] = deque()
        self.totals: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """There is something to do; under the lock."""
        return bool(self._scheduler.busy or self._flights)

    def turn(self) -> None:
        """One round: the device gets its work first, then the host does its own."""
        self._leave()
        self._read_a_piece()
        ready = list(self._flights)
        self._flights.clear()
        constrained = any(one and one.request.grammar for one in self._scheduler.running)
        if not constrained:
            with self._lock:
                n_steps = self._scheduler.n_steps()
            self._start_steps(n_steps)
        for flight in ready:
            self._deliver(flight)
        if constrained:  # what may come next is known once the token before is
            self._start_steps(1, may_guess=False)
            while self._flights:
                self._deliver(self._flights.popleft())

    def _leave(self) -> None:
        """Let go of those that are cancelled or past their deadline."""
        now = time.monotonic()
        with self._lock:
            leaving = self._scheduler.remove(lambda one: one.cancelled or one.expired(now))
        for sequence in leaving:
            sequence.finish('cancelled' if sequence.cancelled else 'deadline')

    def _read_a_piece(self) -> None:
        if self._scheduler.reading is None:
            self._admit()
        sequence = self._scheduler.reading
        if sequence is None:
            return
        prompt, at = sequence.prompt, sequence.n_read
        if at == 0 and sequence.request.source is not None:
            self._slots.read_source(sequence.slot, sequence.request.source)
        n = min(len(prompt) - at, self._slots.piece)
        x_BTD = self._slots.read(sequence.slot, prompt, at, n, sequence.limit)
        sequence.n_read += n
        if sequence.controls.prompt_logprobs is not None:
            self._score(sequence, x_BTD, at, n)
        if sequence.finished or sequence.n_read < len(prompt):
            return
        if sequence.controls.max_tokens:
            self._begin(sequence, x_BTD, n - 1)
        else:
            self._end(sequence, 'length')

    def _admit(self) -> None:
        scheduler, free = self._scheduler, self._scheduler.free()
        with self._lock:
            if not free or not len(scheduler.waiting):
                return
            sequence = scheduler.waiting.pop()
            sequence.slot = source = free[0]
            scheduler.reading = sequence  # before the copy: should it fail, all know of it
        n_cached = 0
        if self._slots.shares and sequence.controls.prompt_logprobs is None:
            sequence.slot, source, n_cached = self._slots.prefixes.find(
                sequence.prompt, free, sequence.owner
            )
        sequence.n_read = sequence.n_cached = n_cached
        if n_cached and source != sequence.slot:
            self._slots.copy(source, sequence.slot)
        held = sequence.prompt[:n_cached]
        self._slots.prefixes.hold(sequence.slot, held, sequence.owner)
        self.totals.update(prompt=len(sequence.prompt), cached=n_cached)

    def _begin(self, sequence: SequenceState, x_BTD: jax.Array, last: int) -> None:
        """The prompt is read: draw its first token."""
        bias_V = None
        if sequence.request.grammar is not None:
            try:
                bias_V = self._bias(sequence)
            except Exception as error:
                self._end(sequence, 'error', str(error))
                return
        drawn = self._slots.begin(
            sequence.slot, sequence.prompt, sequence.controls, x_BTD, last, bias_V
        )
        self._scheduler.begin(sequence)
        self._flights.append(_Flight(drawn, {0: sequence}, 1))

    def _start_steps(self, n_steps: int, *, may_guess: bool = True) -> None:
        running = {i: one for i, one in enumerate(self._scheduler.running) if one}
        if not running:
            return
        drawn, counts = self._slots.steps(list(running), n_steps, may_guess=may_guess)
        self._flights.append(_Flight(drawn, running, n_steps, counts))
        self.totals['steps'] += n_steps

    def _deliver(self, flight: _Flight) -> None:
        """Wait for tokens, and hand them out."""
        drawn, counts = jax.tree.map(np.asarray, (flight.drawn, flight.counts))
        owed = [(row, one) for row, one in flight.sequence_of.items() if not one.finished]
        for row, sequence in owed:
            n_tokens = flight.n_tokens
            if counts is not None:
                how = counts.of(row)
                self.totals.update(guessed=how.guessed, accepted=how.accepted)
                n_tokens = how.tokens
            tokens = drawn.token_BT[row, :n_tokens].tolist()
            failed = NOT_FINITE in tokens
            tokens = tokens[: tokens.index(NOT_FINITE)] if failed else tokens
            logprobs = logprobs_of(drawn, row, len(tokens), sequence.controls.logprobs)
            self.totals['generated'] += sequence.add(tokens, logprobs)
            if failed and not sequence.finished:
                self._fail(sequence)
            elif sequence.finished:
                self._scheduler.release(sequence)
            elif sequence.request.grammar is not None:
                self._follow(sequence, tokens[0])

    def _end(self, sequence: SequenceState, reason: FinishReason, message: str = '') -> None:
        sequence.finish(reason, message)
        self._scheduler.release(sequence)

    def _fail(self, sequence: SequenceState) -> None:
        """The model computed no numbers for this request."""
        self._end(sequence, 'error', str(self._error))
        self._slots.clear(sequence.slot)

    @functools.cached_property
    def _error(self) -> NotFiniteError:
        """It reads all weights, once."""
        return self._programs.not_finite('the model gives')

    def _follow(self, sequence: SequenceState, token: int) -> None:
        """Let a constrained row's grammar know its token; one that fails ends its request only."""
        assert sequence.request.grammar is not None
        try:
            sequence.request.grammar.accept(token)
            bias_V = self._bias(sequence)
        except Exception as error:
            self._end(sequence, 'error', str(error))
            return
        self._slots.put_bias(sequence.slot, bias_V)

    def _score(self, sequence: SequenceState, x_BTD: jax.Array, at: int, n: int) -> None:
        """Log-probabilities of the tokens that follow each of a piece."""
        following = sequence.prompt[at + 1 : at + n + 1]
        drawn = jax.device_get(self._slots.scores(x_BTD, following))
        scores = logprobs_of(drawn, 0, len(following), sequence.controls.prompt_logprobs)
        if not all(math.isfinite(score.logprob) for score in scores):
            return self._fail(sequence)
        sequence.scores.extend(scores)
        if at + n == len(sequence.prompt):
            sequence.tell_scores()

    def _bias(self, sequence: SequenceState) -> np.ndarray:
        """Of a constrained row: its own, and no token that the grammar does not allow."""
        assert sequence.request.grammar is not None
        bias_V = np.where(sequence.request.grammar.mask(), 0, -np.inf).astype(np.float32)
        for token, value in sequence.controls.logit_bias.items():
            bias_V[token] += value
        return bias_V

    def drop_all(self, reason: FinishReason, message: str = '') -> None:
        """End all, whatever they do."""
        self._flights.clear()
        with self._lock:
            dropped = self._scheduler.remove(lambda sequence: True)
        for sequence in dropped:
            sequence.finish(reason, message)

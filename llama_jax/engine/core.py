"""The turns of an engine: the device gets its work, and the host hands out what is there."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

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
    """Work that the device does: a piece of a prompt, or steps."""

    size: int
    """Rows of a step, tokens of a piece."""
    n_steps: int
    """0: a piece of a prompt."""
    waited: bool
    """Running rows, for a piece."""
    begun: float
    done: Any
    """Arrays that are there when it is done."""
    drawn: Drawn | None = None
    """Tokens that come of it."""
    sequence_of: dict[int, SequenceState] = field(default_factory=dict)
    """For whom, by row of `drawn`."""
    counts: Counts | None = None
    """How many tokens of each row, where some were drafted; else one a step, or a first one."""


@dataclass
class _Ahead:
    """The first half of a step, see Slots.ahead."""

    batch: list[int]
    logits_BV: jax.Array
    sequence_of: dict[int, SequenceState]
    """By slot."""


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
        self._idle_since = 0.0  # the device, as far as is known
        self._ahead: _Ahead | None = None
        self.totals: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """There is something to do; under the lock."""
        return bool(self._scheduler.busy or self._flights)

    def turn(self) -> None:
        """One round: the device gets its work first, then the host does its own."""
        self._leave()
        self._admit()
        sequence, n_before = self._scheduler.next_to_read(), len(self._flights)
        if sequence is not None:
            self._read_a_piece(sequence)
        elif any(one and one.request.grammar for one in self._scheduler.running):
            return self._step_by_halves()
        elif self._scheduler.n_running:
            self._start_steps()
        pipelined = sequence is None or self._scheduler.pieces_are_short
        self._deliver(all_but=1 if pipelined and len(self._flights) > n_before else 0)

    def _leave(self) -> None:
        """Let go of those that are cancelled or past their deadline."""
        now = time.monotonic()
        with self._lock:
            leaving = self._scheduler.remove(lambda one: one.cancelled or one.expired(now))
        for sequence in leaving:
            sequence.finish('cancelled' if sequence.cancelled else 'deadline')

    def _admit(self) -> None:
        """Those whose turn it is get the slots that are free."""
        scheduler, slots = self._scheduler, self._slots
        while free := scheduler.free():
            with self._lock:
                if not len(scheduler.waiting):
                    return
                sequence = scheduler.waiting.pop()
                sequence.slot = free[0]
                scheduler.reading.append(sequence)
            if self._shares(sequence):
                sequence.slot, sequence.n_read = slots.prefixes.place(
                    sequence.prompt, free, sequence.owner
                )
                sequence.n_cached = sequence.n_read
            held = sequence.prompt[: sequence.n_read]
            slots.prefixes.hold(sequence.slot, held, sequence.owner)
            self.totals.update(prompt=len(sequence.prompt), cached=sequence.n_cached)

    def _shares(self, sequence: SequenceState) -> bool:
        """It may go on from what another prompt left in the cache. All of a prompt is read that is
        to be scored."""
        return self._slots.shares and sequence.controls.prompt_logprobs is None

    def _share(self, sequence: SequenceState) -> None:
        """Take what another slot holds of its prompt, and it does not: read since it came, too."""
        source, n = self._slots.prefixes.longest(sequence.prompt, sequence.owner)
        more = n - sequence.n_read
        if more > 0:
            self._slots.copy(source, sequence.slot)
            self._slots.prefixes.hold(sequence.slot, sequence.prompt[:n])
            sequence.n_read, sequence.n_cached = n, sequence.n_cached + more
            self.totals['cached'] += more

    def _read_a_piece(self, sequence: SequenceState) -> None:
        begun = time.perf_counter()
        if self._shares(sequence):
            self._share(sequence)
        prompt, at = sequence.prompt, sequence.n_read
        if at == 0 and sequence.request.source is not None:
            self._slots.read_source(sequence.slot, sequence.request.source)
        n = min(len(prompt) - at, self._slots.piece)
        x_BTD = self._slots.read(sequence.slot, prompt, at, n, sequence.limit)
        sequence.n_read += n
        if sequence.controls.prompt_logprobs is not None:
            self._score(sequence, x_BTD, at, n)
        flight = _Flight(x_BTD.shape[1], 0, self._scheduler.n_running > 0, begun, x_BTD)
        if not sequence.finished and sequence.n_read == len(prompt):
            if sequence.controls.max_tokens:
                self._begin(sequence, flight, n - 1)
            else:
                self._end(sequence, 'length')
        self._flights.append(flight)

    def _begin(self, sequence: SequenceState, flight: _Flight, last: int) -> None:
        """The prompt is read: draw its first token, from the features that are on their way."""
        if not self._allow(sequence):
            return
        flight.drawn = self._slots.begin(
            sequence.slot, sequence.prompt, sequence.controls, flight.done, last
        )
        flight.sequence_of = {0: sequence}
        self._scheduler.begin(sequence)

    def _start_steps(self) -> None:
        self._ahead = None
        begun = time.perf_counter()
        running = {i: one for i, one in enumerate(self._scheduler.running) if one}
        size = self._slots.size(len(running))
        n_steps = self._scheduler.n_steps(size)
        batch, drawn, counts = self._slots.steps(list(running), n_steps)
        sequence_of = {row: running[slot] for row, slot in enumerate(batch) if slot in running}
        self._flights.append(
            _Flight(size, n_steps, False, begun, drawn.token_BT, drawn, sequence_of, counts)
        )
        self.totals['steps'] += n_steps

    def _step_by_halves(self) -> None:
        """What a constrained row may draw next is known once the host has the token before. While
        it finds out, the device computes the logits that are drawn from."""
        self._deliver(all_but=0)
        begun, ahead = time.perf_counter(), self._ahead
        if ahead is not None:
            running = self._scheduler.running
            slots = [slot for slot, one in ahead.sequence_of.items() if running[slot] is one]
            drawn = self._slots.choose(ahead.batch, ahead.logits_BV, slots)
            rows = {row: slot for row, slot in enumerate(ahead.batch) if slot in slots}
            sequence_of = {row: ahead.sequence_of[slot] for row, slot in rows.items()}
            self._flights.append(
                _Flight(len(ahead.batch), 1, False, begun, drawn.token_BT, drawn, sequence_of)
            )
            self.totals['steps'] += 1
        now = {slot: one for slot, one in enumerate(self._scheduler.running) if one}
        self._ahead = _Ahead(*self._slots.ahead(list(now)), now) if now else None
        self._deliver(all_but=0)

    def _deliver(self, *, all_but: int) -> None:
        """Wait for what the device does, but for the last `all_but`, and hand out the tokens."""
        while len(self._flights) > all_but:
            flight = self._flights.popleft()
            jax.block_until_ready((flight.done, flight.drawn))
            now = time.perf_counter()
            seconds = now - max(flight.begun, self._idle_since)
            self._idle_since = now
            if flight.n_steps:
                self._scheduler.steps_took(flight.size, flight.n_steps, seconds)
            else:
                self._scheduler.piece_took(flight.size, seconds, waited=flight.waited)
            if flight.drawn is not None:
                self._hand_out(flight)

    def _hand_out(self, flight: _Flight) -> None:
        drawn, counts = jax.tree.map(np.asarray, (flight.drawn, flight.counts))
        owed = [(row, one) for row, one in flight.sequence_of.items() if not one.finished]
        for row, sequence in owed:
            n_tokens = flight.n_steps or 1
            if counts is not None:
                how = counts.of(row)
                self.totals.update(drafted=how.drafted, accepted=how.accepted)
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
                self._allow(sequence, tokens[0])

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

    def _allow(self, sequence: SequenceState, token: int | None = None) -> bool:
        """Let a constrained row's grammar know its newest token, if there is one, and the slot what
        may follow. A grammar that fails ends its request only: then False."""
        grammar, mask_V = sequence.request.grammar, None
        if grammar is not None:
            try:
                if token is not None:
                    grammar.accept(token)
                mask_V = grammar.mask()
            except Exception as error:
                self._end(sequence, 'error', str(error))
                return False
        self._slots.allow(sequence.slot, mask_V)
        return True

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

    def drop_all(self, reason: FinishReason, message: str = '') -> None:
        """End all, whatever they do."""
        self._flights.clear()
        self._ahead = None
        with self._lock:
            dropped = self._scheduler.remove(lambda sequence: True)
        for sequence in dropped:
            sequence.finish(reason, message)

"""Continuous batching: requests join and leave a running batch between its steps."""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.generate.admission import check_request, check_sizes
from llama_jax.generate.decode import Drawn, State
from llama_jax.generate.embed import Embedder
from llama_jax.generate.engine import logprobs_of
from llama_jax.generate.finite import NOT_FINITE, NotFiniteError
from llama_jax.generate.guess import Lookup
from llama_jax.generate.judge import Counts
from llama_jax.generate.live import Live, Stats, Ticket
from llama_jax.generate.prefill import padded
from llama_jax.generate.programs import Programs, bucket
from llama_jax.generate.queue import FairQueue, Prefixes
from llama_jax.generate.request import (
    Finish,
    Logprob,
    OnEvent,
    QueueFullError,
    Request,
)
from llama_jax.generate.rows import RowPrograms
from llama_jax.generate.settings import Settings, history_of, rows_of
from llama_jax.model.cache import slots_needed
from llama_jax.model.config import by_length
from llama_jax.model.patterns import Dense, Window

log = logging.getLogger(__name__)


@dataclass
class _Flight:
    """Tokens that the device is drawing, and for whom."""

    drawn: Drawn
    live_of: dict[int, Live]
    """By row of `drawn`."""
    n_tokens: int
    """Of each row, where nothing was guessed."""
    counts: Counts | None = None
    """Else so many as are counted here."""


@dataclass
class _Reading:
    """The prompt that is being read, piece by piece."""

    live: Live
    row: int
    scores: list[Logprob] = field(default_factory=list)


class Engine:
    """Generates for many requests at once, on a thread of its own.

    A row of the batch serves one request at a time. The loop, again and again: read one piece of
    the next prompt, start some steps of all rows, and hand out the tokens of the steps before,
    while the device computes. All shapes are fixed, so nothing compiles once it is warm, and a
    row's tokens do not depend on the others.

    Attributes:
        length: longest prompt and output together, in tokens.
        rows: requests that are generated at a time.
    """

    _live: list[Live | None]
    """Who is generated in each row."""
    _reading: _Reading | None
    _flights: deque[_Flight]
    _state: State
    _settings: Settings

    def __init__(
        self,
        programs: Programs,
        *,
        token_bytes: Callable[[int], bytes],
        rows: int = 8,
        length: int = 2048,
        source_length: int | None = None,
        queue: int = 256,
        prefill_chunk: int = 128,
        steps: int = 8,
        lookup: Lookup | None = None,
    ):
        """`token_bytes` gives the UTF-8 of a token. `queue`: requests that may wait. Prompts are
        read in pieces of `prefill_chunk` tokens (a power of two); between them `steps` tokens are
        drawn when all rows are busy, fewer when they are not. `source_length`: of the longest
        source, of an encoder-decoder; default: `length`. With `lookup` tokens are guessed: rows
        that repeat themselves need fewer steps, and whether others guess can then change the last
        bits of a row's probabilities. Memory is taken at once, and logged. Raises UserError for
        sizes that cannot be.
        """
        check_sizes(
            programs,
            rows=rows,
            length=length,
            source_length=source_length,
            queue=queue,
            prefill_chunk=prefill_chunk,
            steps=steps,
        )
        config = programs.config
        self.source_length = source_length or (length if config.encoder_layers else 0)
        if not isinstance(config.pattern, Dense | Window):
            log.info('pattern %s: the cache holds whole rows', config.pattern)
        self.programs, self.config = programs, config
        self.rows, self.length = rows, length
        self._token_bytes, self._queue, self._steps = token_bytes, queue, steps
        self._chunk = min(prefill_chunk, bucket(length))
        longest = length + (lookup.n_draft if lookup else 0)  # guesses are written too
        needed = slots_needed(config, length=longest, piece=self._chunk)
        self._slots = -(-needed // self._chunk) * self._chunk
        self._ring = self._slots < longest
        self._lookup = lookup
        self._on_rows = RowPrograms(programs.model, steps=steps, lookup=lookup)
        self._embedder = Embedder(programs)
        n_kept = self._slots + self.source_length
        log.info(
            'engine: %d rows of %d tokens, %.0f MB of keys and values beside %.0f MB of parameters',
            *(rows, length, programs.cache_bytes(rows=rows, slots=n_kept) / 1e6),
            sum(x.nbytes for x in jax.tree.leaves(programs.params)) / 1e6,
        )
        self._began = time.monotonic()
        self._totals: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._waiting: FairQueue[Live] = FairQueue()
        self._closing = False
        self._reset()
        self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Take a request; its events come on the engine's thread. Any thread may call.

        Raises UserError for one that cannot be served, QueueFullError when too many wait.
        """
        check_request(self.programs, request, length=self.length, source_length=self.source_length)
        live = Live(
            request,
            self._counting(on_event),
            token_bytes=self._token_bytes,
            end_ids=self.programs.end_ids,
        )
        with self._changed:
            if self._closing:
                raise QueueFullError('the engine is closing, or has stopped')
            if not self._waiting.has_room(request.owner, self._queue):
                raise QueueFullError(f'{len(self._waiting)} requests wait already')
            self._waiting.append(live)
            self._changed.notify()
        return Ticket(live, self._wake)

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors of unit length, float32 [n, D]; see Embedder. Takes its turns at the device with
        the rows; returns when they are there."""
        return self._embedder(texts)

    @property
    def alive(self) -> bool:
        """It takes requests: neither closed, nor stopped by a failure that it could not mend."""
        return not self._closing and self._thread.is_alive()

    def stats(self) -> Stats:
        """What it is doing."""
        with self._changed:
            busy = sum(live is not None for live in self._live) + (self._reading is not None)
            return Stats(
                rows=self.rows,
                rows_busy=busy,
                waiting=len(self._waiting),
                requests_total=dict(self._reasons),
                prompt_tokens_total=self._totals['prompt'],
                cached_tokens_total=self._totals['cached'],
                generated_tokens_total=self._totals['generated'],
                steps_total=self._totals['steps'],
                guessed_tokens_total=self._totals['guessed'],
                accepted_tokens_total=self._totals['accepted'],
                uptime_seconds=time.monotonic() - self._began,
            )

    def close(self) -> None:
        """Stop; what is not finished is cancelled."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # What follows runs on the engine's thread, but for `_wake` and `_counting`.

    def _run(self) -> None:
        try:
            with jax.set_mesh(self.programs.mesh):
                while self._wait():
                    try:
                        self._turn()
                    except Exception as error:
                        # The state was donated to a program that failed: nobody's rows are whole.
                        log.exception('the engine failed and starts again, empty')
                        self._drop_all('error', f'{type(error).__name__}: {error}')
                        self._reset()
        except BaseException:  # no memory for an empty state, say
            log.exception('the engine has stopped')
        finally:
            with self._changed:
                asked, self._closing = self._closing, True
            self._drop_all(*(('cancelled',) if asked else ('error', 'the engine has stopped')))

    def _wait(self) -> bool:
        """For something to do; False: it is to end."""
        with self._changed:
            while not (self._busy() or self._closing):
                self._changed.wait()
            return not self._closing

    def _turn(self) -> None:
        """One round: the device gets its work first, then the host does its own."""
        self._leave()
        self._read_a_piece()
        ready = list(self._flights)
        self._flights.clear()
        constrained = any(live and live.request.grammar for live in self._live)
        if not constrained:
            self._start_steps(self._n_steps())
        for flight in ready:
            self._deliver(flight)
        if constrained:  # what may come next is known once the token before is
            self._start_steps(1, may_guess=False)
            while self._flights:
                self._deliver(self._flights.popleft())

    def _leave(self) -> None:
        """Let go of those that are cancelled or past their deadline."""
        now = time.monotonic()

        def gone(live: Live) -> bool:
            return live.cancelled or live.expired(now)

        with self._changed:
            leaving = self._waiting.remove(gone)
        leaving += [live for live in self._live if live and not live.finished and gone(live)]
        if self._reading and gone(self._reading.live):
            leaving.append(self._reading.live)
            self._reading = None
        for live in leaving:
            live.finish('cancelled' if live.cancelled else 'deadline')
        self._live = [None if live and live.finished else live for live in self._live]

    def _read_a_piece(self) -> None:
        if self._reading is None:
            self._admit()
        if self._reading is None:
            return
        live, row, programs = self._reading.live, self._reading.row, self.programs
        if live.n_read == 0 and live.request.source is not None:
            source = live.request.source
            length = min(bucket(len(source)), self.source_length)
            token_BS, _ = padded([source], 1, length, programs.model.pad_id)
            self._state = self._on_rows.read_source(
                programs.params, self._state, row, token_BS, len(source)
            )
        at, n = live.n_read, min(len(live.prompt) - live.n_read, self._chunk)
        token_BT = np.full((1, min(bucket(n), self._chunk)), programs.model.pad_id, np.int32)
        token_BT[0, :n] = live.prompt[at : at + n]
        self._state, x_BTD = self._on_rows.read(
            *(programs.params, self._state, row, token_BT, at, live.limit), first=at == 0
        )
        live.n_read += n
        if live.controls.prompt_logprobs is not None:
            self._score(self._reading, x_BTD, at, n)
            if live.finished:
                self._reading = None
                return
        if not self._ring:
            self._prefixes.hold(row, live.prompt[: live.n_read])
        if live.n_read == len(live.prompt):
            self._begin(live, row, x_BTD, n - 1)
            self._reading = None

    def _admit(self) -> None:
        free = [row for row, live in enumerate(self._live) if live is None]
        with self._changed:
            if not free or not len(self._waiting):
                return
            live = self._waiting.pop()
        row, source, n_cached = free[0], free[0], 0
        # What an encoder read is in the keys and values of a prompt too, or the length of the text.
        own = self.config.encoder_layers or by_length(self.config.rope_scaling)
        shares = not self._ring and not own
        if shares and live.controls.prompt_logprobs is None:
            row, source, n_cached = self._prefixes.find(live.prompt, free)
        live.n_read = live.n_cached = n_cached
        self._reading = _Reading(live, row)  # before the copy: should it fail, all know of it
        if n_cached and source != row:
            self._state = self._on_rows.copy(self._state, source, row)
        self._prefixes.hold(row, live.prompt[:n_cached])
        self._totals.update(prompt=len(live.prompt), cached=n_cached)

    def _begin(self, live: Live, row: int, x_BTD: jax.Array, last: int) -> None:
        """The prompt is read: draw its first token."""
        programs, vocab = self.programs, self.config.vocab
        own = rows_of(
            [live.controls],
            lengths=[len(live.prompt)],
            rows=1,
            end_ids=programs.end_ids,
            vocab=vocab,
            bias=True,
        )
        if live.request.grammar is not None:
            try:
                own.bias_BV[0] = self._bias(live)
            except Exception as error:
                live.finish('error', str(error))
                return
        history = history_of([live.prompt], rows=1, vocab=vocab)
        text_BS = None
        if self._lookup:
            text_BS, _ = padded([live.prompt], 1, self.length, programs.model.pad_id)
        self._state, self._settings, drawn = self._on_rows.begin(
            *(programs.params, self._state, self._settings, row, x_BTD, last, len(live.prompt)),
            *jax.tree.map(programs.place, (own, history, text_BS)),
        )
        self._live[row] = live
        self._flights.append(_Flight(drawn, {0: live}, 1))

    def _n_steps(self) -> int:
        """Steps before the next piece of a prompt: few, while few rows would share them."""
        with self._changed:
            others = self._reading is not None or len(self._waiting)
        busy = sum(live is not None for live in self._live)
        return max(1, self._steps * busy // self.rows) if others else self._steps

    def _start_steps(self, n_steps: int, *, may_guess: bool = True) -> None:
        live_of = {row: live for row, live in enumerate(self._live) if live and not live.finished}
        if not live_of:
            return
        dead_B = np.ones(self.rows, bool)
        dead_B[list(live_of)] = False
        self._state, drawn, counts = self._on_rows.steps(
            self.programs.params, self._state, self._settings, dead_B, n_steps, may_guess
        )
        for x in jax.tree.leaves((drawn, counts)):
            x.copy_to_host_async()
        self._flights.append(_Flight(drawn, live_of, n_steps, counts))
        self._totals['steps'] += n_steps

    def _deliver(self, flight: _Flight) -> None:
        """Wait for tokens, and hand them out."""
        drawn, counts = jax.tree.map(np.asarray, (flight.drawn, flight.counts))
        owed = [(row, live) for row, live in flight.live_of.items() if not live.finished]
        for row, live in owed:
            n_tokens = flight.n_tokens
            if counts is not None:
                how = counts.of(row)
                self._totals.update(guessed=how.guessed, accepted=how.accepted)
                n_tokens = how.tokens
            tokens = drawn.token_BT[row, :n_tokens].tolist()
            failed = NOT_FINITE in tokens
            tokens = tokens[: tokens.index(NOT_FINITE)] if failed else tokens
            logprobs = logprobs_of(drawn, row, len(tokens), live.controls.logprobs)
            self._totals['generated'] += live.add(tokens, logprobs)
            if failed and not live.finished:
                self._fail(live, self._live.index(live))
            if live.finished:
                self._live = [None if other is live else other for other in self._live]
            elif live.request.grammar is not None:
                self._follow(live, tokens[0])

    def _fail(self, live: Live, row: int) -> None:
        """The model computed no numbers for this request. The row's keys and values may be none
        either, and would reach the next text there: what nobody sees is multiplied by 0, not left
        out."""
        live.finish('error', str(self._error))
        self._state = self._on_rows.clear(self._state, row)
        self._prefixes.hold(row, ())

    @functools.cached_property
    def _error(self) -> NotFiniteError:
        """It reads all weights, once."""
        return self.programs.not_finite('the model gives')

    def _follow(self, live: Live, token: int) -> None:
        """Let a constrained row's grammar know its token; one that fails ends its request only."""
        assert live.request.grammar is not None
        row = self._live.index(live)
        try:
            live.request.grammar.accept(token)
            bias_BV = self.programs.place(self._bias(live)[None])
        except Exception as error:
            live.finish('error', str(error))
            self._live[row] = None
            return
        self._settings = self._on_rows.put_bias(self._settings, bias_BV, row)

    def _score(self, reading: _Reading, x_BTD: jax.Array, at: int, n: int) -> None:
        """Log-probabilities of the tokens that follow each of a piece."""
        live = reading.live
        following = live.prompt[at + 1 : at + n + 1]
        token_BT = np.zeros((1, x_BTD.shape[1]), np.int32)
        token_BT[0, : len(following)] = following
        drawn = jax.device_get(self._on_rows.scores(self.programs.params, x_BTD, token_BT))
        n_top = live.controls.prompt_logprobs
        scores = logprobs_of(drawn, 0, len(following), n_top)
        if not all(math.isfinite(score.logprob) for score in scores):
            return self._fail(live, reading.row)
        reading.scores.extend(scores)
        if at + n == len(live.prompt):
            live.scored(reading.scores)

    def _bias(self, live: Live) -> np.ndarray:
        """Of a constrained row: its own, and no token that the grammar does not allow."""
        assert live.request.grammar is not None
        bias_V = np.where(live.request.grammar.mask(), 0, -np.inf).astype(np.float32)
        for token, value in live.controls.logit_bias.items():
            bias_V[token] += value
        return bias_V

    def _busy(self) -> bool:
        rows = any(live is not None for live in self._live)
        return bool(rows or self._reading or len(self._waiting) or self._flights)

    def _drop_all(self, reason: str, message: str = '') -> None:
        with self._changed:
            dropped = self._waiting.remove(lambda live: True)
        dropped += [live for live in self._live if live is not None]
        if self._reading:
            dropped.append(self._reading.live)
        self._live, self._reading = [None] * self.rows, None
        for live in dropped:
            live.finish(reason, message)  # type: ignore[arg-type]

    def _reset(self) -> None:
        programs, vocab = self.programs, self.config.vocab
        self._live = [None] * self.rows
        self._reading = None
        self._flights = deque()
        self._prefixes = Prefixes(self.rows, self._chunk)
        settings = rows_of([], lengths=[], rows=self.rows, end_ids=(), vocab=vocab, bias=True)
        zeros = np.zeros(self.rows, np.int32)
        nothing = history_of([], rows=self.rows, vocab=vocab)
        text_BS = np.zeros((self.rows, self.length), np.int32) if self._lookup else None
        self._settings, zero_B, done_B, history, text_BS = jax.tree.map(
            programs.place, (settings, zeros, np.ones(self.rows, bool), nothing, text_BS)
        )
        with jax.set_mesh(programs.mesh):
            cache = programs.empty(batch=self.rows, slots=self._slots)
            if self.source_length:
                cross = programs.empty_cross(batch=self.rows, slots=self.source_length)
                cache = replace(cache, cross=cross)
        self._state = State(cache, zero_B, jnp.copy(zero_B), done_B, history, text_BS)

    def _counting(self, on_event: OnEvent) -> OnEvent:
        def counted(event: object) -> None:
            if isinstance(event, Finish):
                self._reasons[event.reason] += 1
            on_event(event)  # type: ignore[arg-type]

        return counted

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

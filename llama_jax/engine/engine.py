"""Continuous batching: requests join and leave a running batch between its steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from llama_jax.engine.admission import check_request, check_sizes
from llama_jax.engine.core import Core
from llama_jax.engine.request import Finish, OnEvent, QueueFullError, Request
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sequence import SequenceState, Ticket
from llama_jax.engine.slots import Slots
from llama_jax.engine.stats import Stats
from llama_jax.generate.embed import Embedder
from llama_jax.generate.programs import Programs
from llama_jax.generate.speculative.draft import Heads, Lookup
from llama_jax.generate.speculative.loop import check

log = logging.getLogger(__name__)


class Engine:
    """Generates for many requests at once, on a thread of its own.

    A slot of the KV cache serves one request at a time. The loop, again and again: start a piece of
    a prompt or some decode steps, and hand out the tokens of the steps before, while the device
    computes. All shapes are fixed, so nothing compiles once it is warm, and a row's tokens do not
    depend on the others.

    Attributes:
        length: longest prompt and output together, in tokens.
        rows: requests that are generated at a time.
    """

    def __init__(
        self,
        programs: Programs,
        *,
        token_bytes: Callable[[int], bytes],
        control: Mapping[str, int] | None = None,
        rows: int = 8,
        length: int = 2048,
        source_length: int | None = None,
        queue: int = 256,
        prefill_chunk: int = 128,
        steps: int = 8,
        speculate: Lookup | Heads | None = None,
        warm: bool = False,
    ):
        """`token_bytes` gives the UTF-8 of a token, `control` the ids of control tokens by name, as
        stop strings may name them. `queue`: requests that may wait. Prompts are read in pieces of
        `prefill_chunk` tokens (a power of two), by turns; at most `steps` tokens are drawn at a
        time, as many as the device draws in 20 ms. `source_length`: of the longest source, of an
        encoder-decoder; default: `length`. With `speculate` tokens are drafted: rows whose
        drafts hold need fewer steps, and whether others draft can then change the last bits of a
        row's probabilities. `warm`: steps for every number of rows are compiled at once, not when
        they are first needed. Memory is taken at once, and logged. Raises UserError for sizes that
        cannot be.
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
        if speculate is not None:
            check(programs, speculate, longest=length)
        self.programs, self.config = programs, programs.config
        self.source_length = source_length or (length if self.config.encoder_layers else 0)
        self.rows, self.length = rows, length
        self._token_bytes, self._queue = token_bytes, queue
        self._names = {token: name for name, token in (control or {}).items()}
        self._slots = Slots(
            programs,
            rows=rows,
            length=length,
            source_length=self.source_length,
            prefill_chunk=prefill_chunk,
            steps=steps,
            speculate=speculate,
        )
        self._scheduler = Scheduler(rows=rows, steps=steps, piece=self._slots.piece)
        self._embedder = Embedder(programs)
        self._began = time.monotonic()
        self._reasons: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._core = Core(programs, self._slots, self._scheduler, self._changed)
        self._closing = False
        if warm:
            with jax.set_mesh(programs.mesh):
                self._slots.warm()
        self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Take a request; its events come on the engine's thread. Any thread may call.

        Raises UserError for one that cannot be served, QueueFullError when too many wait.
        """
        check_request(self.programs, request, length=self.length, source_length=self.source_length)
        sequence = SequenceState(
            request,
            self._counting(on_event),
            token_bytes=self._token_bytes,
            end_ids=self.programs.end_ids,
            names=self._names,
        )
        with self._changed:
            waiting = self._scheduler.waiting
            if self._closing:
                raise QueueFullError('the engine is closing, or has stopped')
            if not waiting.has_room(request.owner, self._queue):
                raise QueueFullError(f'{len(waiting)} requests wait already')
            waiting.append(sequence)
            self._changed.notify()
        return Ticket(sequence, self._wake)

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
            return Stats(
                rows=self.rows,
                rows_busy=self._scheduler.n_busy,
                waiting=len(self._scheduler.waiting),
                requests_total=dict(self._reasons),
                prompt_tokens_total=self._core.totals['prompt'],
                cached_tokens_total=self._core.totals['cached'],
                generated_tokens_total=self._core.totals['generated'],
                steps_total=self._core.totals['steps'],
                drafted_tokens_total=self._core.totals['drafted'],
                accepted_tokens_total=self._core.totals['accepted'],
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
                        self._core.turn()
                    except Exception as error:
                        # The state was donated to a program that failed: nobody's rows are whole.
                        log.exception('the engine failed and starts again, empty')
                        self._core.drop_all('error', f'{type(error).__name__}: {error}')
                        self._slots.reset()
        except BaseException:  # no memory for an empty state, say
            log.exception('the engine has stopped')
        finally:
            with self._changed:
                asked, self._closing = self._closing, True
            self._core.drop_all(*(('cancelled',) if asked else ('error', 'the engine has stopped')))

    def _wait(self) -> bool:
        """For something to do; False: it is to end."""
        with self._changed:
            while not (self._core.busy or self._closing):
                self._changed.wait()
            return not self._closing

    def _counting(self, on_event: OnEvent) -> OnEvent:
        def counted(event: object) -> None:
            if isinstance(event, Finish):
                self._reasons[event.reason] += 1
            on_event(event)  # type: ignore[arg-type]

        return counted

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

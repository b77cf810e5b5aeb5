"""Who gets a slot, whose prompt is read next, and when decode steps run.

Prompts are read in pieces (chunked prefill, Agrawal et al. 2023), by turns: first that of which the
least is left, as that ends the most waiting, and now and then the oldest, so that none is overtaken
for ever. Pieces take the device's time from the texts that are being written, so these are owed a
share of it, which steps pay back.
"""

from __future__ import annotations

from collections.abc import Callable

from llama_jax.engine.queue import FairQueue
from llama_jax.engine.sequence import SequenceState

RUNNING_SHARE = 0.6
"""Of the device's time, for decode steps, while prompts are read and texts are written."""
OVERTAKEN = 3
"""Pieces of others that are read while the oldest prompt waits."""
AHEAD = 2
"""Pieces that may be read before steps, on credit, where each ends a prompt."""
QUANTUM = 0.02
"""Seconds of the steps that are started together: whoever comes then waits so long."""
SHORT = 0.01
"""Seconds of a piece behind which more is started before it is done."""


class Scheduler:
    """What an engine serves: sequences that wait, that read their prompts, that run.

    All on the host, and told what the device's work took. Not thread-safe: `waiting` is used under
    the engine's lock, all else by its thread.
    """

    def __init__(self, *, rows: int, steps: int, piece: int):
        """At most `steps` are started together; prompts are read in pieces of `piece` tokens."""
        self._steps, self._piece = steps, piece
        self.waiting: FairQueue[SequenceState] = FairQueue()
        self.reading: list[SequenceState] = []
        """The oldest first."""
        self.running: list[SequenceState | None] = [None] * rows
        """By slot."""
        self._overtaken = 0  # the oldest of `reading`
        self._owed = 0.0  # seconds of steps
        self._piece_seconds = 0.0
        self._step_seconds: dict[int, float] = {}
        self._seen: set[tuple[str, int]] = set()

    @property
    def busy(self) -> bool:
        """Somebody waits, reads or runs."""
        return bool(self.n_busy or len(self.waiting))

    @property
    def n_running(self) -> int:
        """Sequences whose text is being written."""
        return sum(one is not None for one in self.running)

    @property
    def n_busy(self) -> int:
        """Slots in use."""
        return self.n_running + len(self.reading)

    def free(self) -> list[int]:
        """Slots that nobody uses."""
        taken = {one.slot for one in self.reading}
        return [i for i, one in enumerate(self.running) if one is None and i not in taken]

    def begin(self, sequence: SequenceState) -> None:
        """Its prompt is read."""
        self._drop(sequence)
        self.running[sequence.slot] = sequence

    def release(self, sequence: SequenceState) -> None:
        """Its slot is free."""
        self._drop(sequence)
        self.running = [None if one is sequence else one for one in self.running]

    def remove(self, gone: Callable[[SequenceState], bool]) -> list[SequenceState]:
        """Let go of all that meet a condition; under the engine's lock."""
        leaving = self.waiting.remove(gone)
        held = [*self.running, *self.reading]
        leaving += [one for one in held if one and not one.finished and gone(one)]
        for one in leaving:
            self.release(one)
        return leaving

    def next_to_read(self) -> SequenceState | None:
        """Whose prompt the next piece is of; None: steps come first, or nobody reads. It counts as
        read."""
        if not self.reading:
            return None
        oldest, one = self.reading[0], min(self.reading, key=_left)
        if self._overtaken >= OVERTAKEN:
            one = oldest
        if self.n_running:
            ends = _left(one) <= self._piece
            if self._owed > (AHEAD * _worth(self._piece_seconds) if ends else 0):
                return None
        else:
            self._owed = 0.0
        self._overtaken = 0 if one is oldest else self._overtaken + 1
        return one

    def n_steps(self, size: int) -> int:
        """Steps of `size` rows that are started together."""
        seconds = self._step_seconds.get(size)
        return 1 if not seconds else max(1, min(self._steps, int(QUANTUM / seconds)))

    @property
    def pieces_are_short(self) -> bool:
        """The next work may be started before a piece is done: whoever comes in between does not
        wait long for both."""
        return 0 < self._piece_seconds < SHORT

    def piece_took(self, size: int, seconds: float, *, waited: bool) -> None:
        """A piece of so many tokens was read; whether running rows `waited` for it."""
        if self._compiled(('piece', size)):
            self._piece_seconds = seconds
            self._owed += _worth(seconds) if waited else 0.0

    def steps_took(self, size: int, n: int, seconds: float) -> None:
        """`n` steps of `size` rows were done."""
        if self._compiled(('steps', size)):
            self._step_seconds[size] = seconds / n
            self._owed = max(0.0, self._owed - seconds)

    def _compiled(self, shape: tuple[str, int]) -> bool:
        """Whether it was seen before: the first time may have gone into compiling it."""
        known = shape in self._seen
        self._seen.add(shape)
        return known

    def _drop(self, sequence: SequenceState) -> None:
        if sequence in self.reading:
            if sequence is self.reading[0]:
                self._overtaken = 0
            self.reading.remove(sequence)


def _left(sequence: SequenceState) -> int:
    """Tokens of its prompt that are still to be read."""
    return len(sequence.prompt) - sequence.n_read


def _worth(seconds: float) -> float:
    """Seconds of steps that are owed for those of a piece."""
    return seconds * RUNNING_SHARE / (1 - RUNNING_SHARE)

"""Who gets a slot, whose prompt is read next, and how many decode steps run in between."""

from __future__ import annotations

from collections.abc import Callable

from llama_jax.engine.queue import FairQueue
from llama_jax.engine.sequence import SequenceState


class Scheduler:
    """What the engine serves, on the host: sequences that wait, that read their prompt, that run.

    Not thread-safe but for `waiting`, which is used under the engine's lock.
    """

    def __init__(self, *, rows: int, steps: int):
        self._rows, self._steps = rows, steps
        self.waiting: FairQueue[SequenceState] = FairQueue()
        self.running: list[SequenceState | None] = [None] * rows
        """By slot."""
        self.reading: SequenceState | None = None

    @property
    def busy(self) -> bool:
        """Somebody waits, reads or runs."""
        return bool(self.n_busy or len(self.waiting))

    @property
    def n_busy(self) -> int:
        """Slots in use."""
        return sum(one is not None for one in self.running) + (self.reading is not None)

    def free(self) -> list[int]:
        """Slots that nobody uses."""
        taken = -1 if self.reading is None else self.reading.slot
        return [i for i, one in enumerate(self.running) if one is None and i != taken]

    def begin(self, sequence: SequenceState) -> None:
        """Its prompt is read."""
        self.running[sequence.slot] = sequence
        self.reading = None

    def release(self, sequence: SequenceState) -> None:
        """Its slot is free."""
        self.running = [None if one is sequence else one for one in self.running]
        if self.reading is sequence:
            self.reading = None

    def remove(self, gone: Callable[[SequenceState], bool]) -> list[SequenceState]:
        """Let go of all that meet a condition; under the engine's lock."""
        leaving = self.waiting.remove(gone)
        held = [*self.running, self.reading]
        leaving += [one for one in held if one and not one.finished and gone(one)]
        for one in leaving:
            self.release(one)
        return leaving

    def n_steps(self) -> int:
        """Steps before the next piece of a prompt: few, while few rows would share them."""
        others = self.reading is not None or len(self.waiting)
        busy = sum(one is not None for one in self.running)
        return max(1, self._steps * busy // self._rows) if others else self._steps

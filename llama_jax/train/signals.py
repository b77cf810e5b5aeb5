"""SIGTERM and SIGINT of a process that trains: obeyed within seconds, and no step is lost."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llama_jax.errors import Stopped
from llama_jax.train.agreement import leave, write

GRACE_SECONDS = 4.0
"""So long a process that has nothing to lose may stay in compiled code after a signal, where no
exception of Python reaches it."""

_TWICE_SECONDS = 0.5
"""Some launchers pass on a Ctrl-C that the terminal has sent to the process as well: one signal."""

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class _Rule:
    """What a signal does."""

    outcome: str = ''
    """What becomes of the run, to follow 'stopped by SIGTERM'."""
    raises: bool = False
    """Stopped is raised where the main thread stands."""
    ends: bool = False
    """The process ends, if need be without the main thread: nothing would be lost."""


class Signals:
    """What SIGTERM and SIGINT do, from place to place. A first one is noted; elsewhere than in
    `stopping` that is all, and whoever trains obeys as soon as the state is saved.

    A second signal ends the process at once, wherever it is. Nothing half-written is taken for
    whole afterwards: checkpoints and records get their names when they are complete.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the first signal; 0: none."""
        self._rule = _Rule()
        self._handled = False

    @contextmanager
    def stopping(self, outcome: str, *, raises: bool = True, ends: bool = True) -> Iterator[None]:
        """Here a signal raises Stopped in the main thread (`raises`); where compiled code holds
        that up for more than GRACE_SECONDS, the process ends without it (`ends`).

        `outcome` says what becomes of the run, to follow 'stopped by SIGTERM'. A signal that came
        before counts.
        """
        before, self._rule = self._rule, _Rule(outcome, raises, ends)
        try:
            if self.number and raises:
                raise stopped(self.number, outcome)
            yield
        finally:
            self._rule = before

    def handle(self, number: int, frame: object) -> None:
        """The handler, which Python calls in the main thread between two of its instructions."""
        if self._handled:  # `watch` deals with a second one
            return
        self._handled = True
        self.number = self.number or number
        if self._rule.raises:
            raise stopped(self.number, self._rule.outcome)
        # Not print: the signal may have come in the midst of one, which cannot be entered twice.
        name = signal.Signals(number).name
        write(f'{name}: stopping as soon as the last step is saved (a second one ends at once)')

    def watch(self, pipe: int) -> None:
        """End the process where the handler cannot. `pipe` yields the number of each signal as it
        comes, whatever the main thread is at, and ends with it."""
        first: float | None = None
        while True:
            ready, _, _ = select.select([pipe], [], [], 0.2)
            numbers = os.read(pipe, 64) if ready else b' '
            if not numbers:
                return
            for number in numbers:
                if number not in _NUMBERS:
                    continue
                if first is not None and time.monotonic() - first > _TWICE_SECONDS:
                    name = signal.Signals(number).name
                    leave(f'ended at once by a second signal, {name}', 128 + number)
                first = first or time.monotonic()
                self.number = self.number or number
            rule = self._rule
            if first is not None and rule.ends and time.monotonic() - first > GRACE_SECONDS:
                leave(str(stopped(self.number, rule.outcome)), 128 + self.number)


@contextmanager
def caught() -> Iterator[Signals]:
    """SIGTERM and SIGINT go to the Signals that this yields. Elsewhere than in the main thread
    Python receives none, and it stays empty."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    watcher = threading.Thread(target=signals.watch, args=(source,), daemon=True)
    watcher.start()
    fd_before = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    before = {number: signal.signal(number, signals.handle) for number in _NUMBERS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        os.close(sink)
        watcher.join()
        os.close(source)


def stopped(number: int, outcome: str) -> Stopped:
    """The exception that says what became of a run."""
    return Stopped(f'stopped by {signal.Signals(number).name} {outcome}', exit_code=128 + number)

"""Runs a grid: each run in a process of its own, so that one that fails takes no other with it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from llama_jax.compare.grid import LOG, Planned
from llama_jax.errors import Stopped
from llama_jax.train.progress import say
from llama_jax.units import duration

_POLL = 0.2
_SECONDS_BETWEEN_LINES = 60


@dataclass
class Child:
    """A process at work on a run."""

    run: Planned
    process: subprocess.Popen
    log: IO[bytes]
    since: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        """Give back what this process held of it."""
        self.log.close()
        if self.process.stdin:
            self.process.stdin.close()


def run_all(
    planned: Sequence[Planned],
    workdir: Path,
    *,
    command: Callable[[Planned], list[str]],
    jobs: int,
) -> list[str]:
    """Run what is not finished, `jobs` at a time; a line for every run that failed.

    `command` is what trains and evaluates one run and leaves with 0. Its standard input is a pipe
    that ends with this process (see `leave_with_parent`); what it prints goes to log.txt in the
    directory of its run. Raises Stopped after SIGTERM or SIGINT, which go on to the processes, once
    they are gone.
    """
    todo = [run for run in planned if not run.finished(workdir)]
    done = len(planned) - len(todo)
    say(f'{len(planned)} runs' + (f', {done} of them finished before' if done else ''))
    children: list[Child] = []
    failed: list[str] = []
    took: list[float] = []
    told = time.monotonic()
    with _signals() as received:
        try:
            while (todo or children) and not received:
                while todo and len(children) < jobs:
                    children.append(_start(todo.pop(0), workdir, command))
                    run, told = children[-1].run, time.monotonic()
                    say(f'[{done + len(children)}/{len(planned)}] {run.place} begins')
                time.sleep(_POLL)
                for child in [x for x in children if x.process.poll() is not None]:
                    children.remove(child)
                    child.close()
                    done += 1
                    took.append(time.monotonic() - child.since)
                    line = _outcome(child, workdir)
                    left = len(todo) + len(children)
                    if line is None:
                        say(
                            f'{child.run.place} finished in {duration(took[-1])}; '
                            + _left(left, took, jobs)
                        )
                    else:
                        failed.append(line)
                        say(f'{line}; {left} left')
                if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                    told = time.monotonic()
                    for child in children:
                        say(f'{child.run.place}: {last_line(child.run.directory(workdir) / LOG)}')
                    say(_left(len(todo) + len(children), took, jobs))
        finally:
            _end(children, received)
    if received:
        name = signal.Signals(received[0]).name
        raise Stopped(
            f'stopped by {name}; {len(todo) + len(children)} of {len(planned)} runs are left, and '
            f'the same command goes on in {workdir}',
            exit_code=128 + received[0],
        )
    return failed


def leave_with_parent() -> None:
    """In a child of `run_all`: SIGTERM when the parent is gone, however it went."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def last_line(log: Path) -> str:
    """The last line that says something, as a terminal shows it."""
    try:
        with log.open('rb') as file:
            file.seek(max(0, log.stat().st_size - 8192))
            text = file.read().decode(errors='replace')
    except OSError:
        return 'no log'
    lines = [line.rstrip('\r').rsplit('\r')[-1].strip() for line in text.split('\n')]
    return next((line for line in reversed(lines) if line), 'an empty log')


def _start(run: Planned, workdir: Path, command: Callable[[Planned], list[str]]) -> Child:
    directory = run.directory(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    log = (directory / LOG).open('ab')
    process = subprocess.Popen(
        command(run),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C comes here alone, and goes on to them as one signal
    )
    return Child(run, process, log)


def _outcome(child: Child, workdir: Path) -> str | None:
    """None for a run that is finished; else what is the matter."""
    code = child.process.returncode
    if code == 0 and child.run.finished(workdir):
        return None
    log = child.run.directory(workdir) / LOG
    how = f'was killed by {signal.Signals(-code).name}' if code < 0 else f'failed ({code})'
    return f'{child.run.place} {how}: {last_line(log)} (all of it in {log})'


def _end(children: Sequence[Child], received: Sequence[int]) -> None:
    """Let the processes save and go; at a second signal they go at once."""
    if children:
        say(f'waiting for {len(children)} to save what they have')
    for child in children:
        child.process.send_signal(signal.SIGTERM)
    for child in children:
        while child.process.poll() is None:
            if len(received) > 1:
                child.process.kill()
            time.sleep(_POLL)
        child.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGHUP."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in numbers
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _left(n: int, took: Sequence[float], jobs: int) -> str:
    """How many runs are left, and about how long they take."""
    if not n:
        return 'none left'
    if not took:
        return f'{n} left'
    rounds = -(-n // jobs)
    return f'{n} left, about {duration(rounds * sum(took) / len(took))}'

"""Jobs in processes of their own: started without the caller's script, gone when it is gone."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llama_jax.errors import UserError

_SAY_SECONDS = 0.2
_CODE = 'from llama_jax.data.workers import serve; serve()'

Result = TypeVar('Result', covariant=True)


class Job(Protocol[Result]):
    """Something to run, which tells how many bytes it has read meanwhile."""

    def run(self, seen: Callable[[int], None]) -> Result: ...


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def run(
    jobs: Sequence[Job[Result]], processes: int, seen: Callable[[int], None], remedy: str
) -> Iterator[Result]:
    """The results of the jobs, as they come. 0 processes: this one does all.

    The error of a job is raised here, of several the first in their order. Raises UserError, which
    ends with `remedy`, where a process was killed. All processes end with this generator.
    """
    if processes == 0:
        for job in jobs:
            yield job.run(seen)
        return
    with contextlib.ExitStack() as stack:
        said: queue.Queue[tuple[_Worker, str, Any]] = queue.Queue()
        workers = [_Worker(said) for _ in range(min(processes, len(jobs)))]
        for worker in workers:
            stack.callback(worker.kill)
        waiting = list(enumerate(jobs))[::-1]
        failed: dict[int, BaseException] = {}
        busy: dict[_Worker, int] = {}

        def give(worker: _Worker) -> None:
            if waiting and not failed:
                busy[worker], job = waiting.pop()
                worker.give(job)

        for worker in workers:
            give(worker)
        # A job before the one that failed may fail as well, and is the one to tell of.
        while busy and not (failed and min(busy.values()) > min(failed)):
            try:
                worker, kind, what = said.get(timeout=1.0)  # so that signals get their turn
            except queue.Empty:
                continue
            if kind == 'seen':
                seen(what)
                continue
            if worker not in busy:
                continue  # it died when nothing was left for it to do
            number = busy.pop(worker)
            if kind == 'done':
                yield what
            elif kind == 'failed':
                failed[number] = what
            else:
                failed[number] = UserError(f'{worker.end()} while it worked; {remedy}')
            give(worker)
        if failed:
            raise failed[min(failed)]


class _Worker:
    """A process, and a thread that hears what it says."""

    def __init__(self, said: queue.Queue[tuple[_Worker, str, Any]]) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get('PYTHONPATH')])])
        self._process = subprocess.Popen(
            [sys.executable, '-c', _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, 'PYTHONPATH': path},
            start_new_session=True,  # Ctrl-C is for the caller, who ends it
        )
        self._thread = threading.Thread(target=self._hear, args=(said,), daemon=True)
        self._thread.start()

    def give(self, job: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which _hear tells
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()

    def _hear(self, said: queue.Queue[tuple[_Worker, str, Any]]) -> None:
        assert self._process.stdout is not None
        try:
            while True:
                kind, what = pickle.load(self._process.stdout)
                said.put((self, kind, what))
        except (EOFError, pickle.UnpicklingError, ValueError, OSError):
            said.put((self, 'died', None))

    def end(self) -> str:
        """How the process ended."""
        code = self._process.wait()
        if code < 0:
            return f'a process was killed by {signal.Signals(-code).name}'
        return f'a process ended with code {code}'

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of a job that it did not hear any more
                pipe.close()


def serve() -> None:
    """The process: runs the jobs that come on its standard input until there are no more."""
    answers, jobs = os.fdopen(os.dup(1), 'wb'), sys.stdin.buffer
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            job = pickle.load(jobs)
            _say(answers, *_outcome(job, answers))


def _outcome(job: Job[Any], answers: io.BufferedWriter) -> tuple[str, Any]:
    count, last = 0, time.monotonic()

    def seen(more: int) -> None:
        nonlocal count, last
        count += more
        if (now := time.monotonic()) - last > _SAY_SECONDS:
            _say(answers, 'seen', count)  # fails, and ends the process, once nobody hears it
            count, last = 0, now

    try:
        result = job.run(seen)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        return 'failed', error
    except Exception:
        return 'failed', RuntimeError(f'in a process that prepares data:\n{traceback.format_exc()}')
    _say(answers, 'seen', count)
    return 'done', result


def _say(answers: io.BufferedWriter, kind: str, what: Any) -> None:
    pickle.dump((kind, what), answers)
    answers.flush()

"""The processes of a run, one per host: they are given the same, and one that fails ends all.

They talk through JAX's coordination service, which needs no device and compiles nothing: a process
that waits here may wait for ever, and still hears of the failure of another. With one process
everything here does nothing.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the service's client has no public name, in jax 0.10 to 0.12

from llama_jax.errors import Stopped, UserError
from llama_jax.train.checkpoint import difference
from llama_jax.train.code import all_code
from llama_jax.train.records import versions

_KEY = 'llama_jax'
_FAILURE = f'{_KEY}/failure'
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 1.5
"""For a process that hears of a failure to meet the same, say what it knows and end by itself."""

_LAST_SECONDS = 4.0
"""So much later process 0 ends, through which the others hear."""

_asked = 0
_failures: list[BaseException] = []


def same(values: dict[str, Any], what: str, remedy: str = '') -> None:
    """Raise UserError unless all processes call this with equal `values` (of plain JSON).

    The message names what differs, and in which process: `what` they are, and what to do. It waits
    for the slowest of them.
    """
    if jax.process_count() == 1:
        return
    global _asked
    _asked += 1
    topic, me = f'{_KEY}/same/{_asked}', jax.process_index()
    mine = json.loads(json.dumps(values))
    if me == 0:
        _put(f'{topic}/values', json.dumps(mine))
        answers = [json.loads(_wait(f'{topic}/{i}')) for i in range(1, jax.process_count())]
        told = [f'process {i} has {x}' for i, x in enumerate(answers, start=1) if x]
        _put(f'{topic}/verdict', '; '.join(told))
    else:
        lines = difference(json.loads(_wait(f'{topic}/values')), mine)
        _put(f'{topic}/{me}', json.dumps('; '.join(lines)))
    verdict = _wait(f'{topic}/verdict')
    if verdict:
        raise UserError(
            f'the processes of this run differ in their {what} (process 0 -> the other): '
            f'{verdict}. {remedy or "Give all of them the same command, code and files"}'
        )


def code() -> dict[str, Any]:
    """What must be equal of the software: the package's sources, and what decides results."""
    python, others = '.'.join(map(str, sys.version_info[:2])), versions()
    return {'llama_jax': all_code()[:16], **others, 'python': python}


@contextmanager
def together() -> Iterator[None]:
    """When one process leaves this by an exception, all end within seconds, and say why.

    Without it the others would wait for that one in their next collective operation.
    """
    if jax.process_count() == 1:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_listen, args=(done,), daemon=True).start()
    try:
        yield
    except BaseException as error:
        failed(error)
        raise
    finally:
        done.set()


def failed(error: BaseException) -> None:
    """Tell the other processes of a failure; this one has a few seconds left to end by itself."""
    if jax.process_count() == 1 or _failures:
        return
    _failures.append(error)
    code = 2 if isinstance(error, UserError) else getattr(error, 'exit_code', 1)
    line = (
        str(error) if isinstance(error, UserError | Stopped) else f'{type(error).__name__}: {error}'
    )
    tell(line, code)
    # At exit JAX waits for the others, which may be gone.
    deadline = threading.Timer(2 * _LAST_SECONDS, os._exit, [code])
    deadline.daemon = True
    deadline.start()


def defer() -> None:
    """Where another process has failed, what fails here is only a consequence, such as a broken
    connection: wait for `_listen`, which ends this process with the cause."""
    if jax.process_count() > 1:
        with contextlib.suppress(Exception):
            told = _get(_FAILURE)
            if told and json.loads(told)['process'] != jax.process_index():
                time.sleep(10 * _LAST_SECONDS)


def tell(line: str, code: int) -> None:
    """Let the other processes know that this one ends, and how."""
    if jax.process_count() == 1:
        return
    text = json.dumps({'process': jax.process_index(), 'line': line, 'code': code})
    with contextlib.suppress(Exception):  # another was first, or the service is gone
        _put(_FAILURE, text)


def leave(line: str, code: int) -> NoReturn:
    """End this process now: no thread and no exit handler can hold it up (and those of JAX crash
    where a compilation was broken off). `line` is said, to the other processes of the run as well,
    and the workers of this one end with it."""
    tell(line, code)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if sys.stderr.isatty():
        line = f'\x1b[?25h{line}'  # a progress bar may have hidden the cursor
    write(line)
    for child in multiprocessing.active_children():
        with contextlib.suppress(Exception):
            child.kill()
    if jax.process_count() > 1:  # those who wait for this one are to hear why, and first
        time.sleep(_GRACE_SECONDS + 1 if jax.process_index() else _LAST_SECONDS)
    os._exit(code)


def write(line: str) -> None:
    """One line on standard error, by one system call."""
    with contextlib.suppress(OSError):
        os.write(2, f'{line}\n'.encode())


def _listen(done: threading.Event) -> None:
    """End this process when another has failed and this one does not notice by itself."""
    while not done.wait(_POLL_SECONDS):
        try:
            told = _get(_FAILURE)
        except Exception:  # noqa: BLE001  the service is gone; JAX itself ends the process then
            return
        if told is None:
            continue
        failure = json.loads(told)
        if failure['process'] == jax.process_index() or done.wait(_GRACE_SECONDS):
            return
        line = failure['line'].splitlines()[0]
        leave(f'process {failure["process"]} ended, and this one with it: {line}', failure['code'])


def _client() -> Any:
    return distributed.global_state.client


def _put(key: str, text: str) -> None:
    _client().key_value_set(key, text)


def _get(key: str) -> str | None:
    try:
        return _client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if 'NOT_FOUND' in str(error):
            return None
        raise


def _wait(key: str) -> str:
    """The value under `key`, once it is there. Signals and `_listen` can end this."""
    pause = 0.01
    while (text := _get(key)) is None:
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)
    return text

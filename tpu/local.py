"""Several processes on this machine that stand in for the hosts of a pod.

    python -m tpu.local --processes 2 -- python -m experiments.pretrain quickstart --workdir runs/x

Each runs the command on CPU devices of its own; they meet through JAX's distributed runtime, with
gloo for the collectives. Every line of output is prefixed with the number of its process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from llama_jax import installed, runtime

GRACE_SECONDS = 10.0
"""After one process failed, the others have this long to report the same error before they die."""


def launch(command: Sequence[str], *, processes: int, devices_per_process: int = 1) -> int:
    """Run `command` as `processes` processes; the exit code of the first that failed, or 0.

    SIGTERM and SIGINT are passed on to all. When one fails, the rest is killed: they would wait for
    it for ever.
    """
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        coordinator = f'127.0.0.1:{listener.getsockname()[1]}'
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for process in range(processes):
            environment = _environment(coordinator, processes, process, devices_per_process)
            # A session of its own: Ctrl-C reaches a child once, by `forward`.
            child = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            children.append(child)
        readers = [
            threading.Thread(target=_prefix, args=(child.stdout, process), daemon=True)
            for process, child in enumerate(children)
        ]
        for reader in readers:
            reader.start()
        code = _wait(children)
        for reader in readers:
            reader.join(GRACE_SECONDS)
        return code
    finally:
        _kill(children)
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(coordinator: str, processes: int, process: int, devices: int) -> dict[str, str]:
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': (
            f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
        ).strip(),
        'PYTHONUNBUFFERED': '1',
        runtime.COORDINATOR: coordinator,
        runtime.PROCESSES: str(processes),
        runtime.PROCESS: str(process),
    }
    environment.pop('JAX_NUM_CPU_DEVICES', None)  # XLA refuses it beside the flag
    return environment


def _prefix(stream: IO[bytes], process: int) -> None:
    for line in stream:
        if line.startswith(b'[Gloo] Rank '):  # one line per device and group, of no news
            continue
        text = line.decode('utf-8', errors='replace').rstrip('\n')
        # In one piece: print writes the end of a line apart, where another process may come in.
        sys.stdout.write(f'[{process}] {text}\n')
        sys.stdout.flush()


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all, or for the first failure and a while longer."""
    deadline = None
    failure = 0
    while True:
        codes = [child.poll() for child in children]
        if not failure:
            failed = next((code for code in codes if code), 0)
            failure = 128 - failed if failed < 0 else failed
        if None not in codes:
            return failure
        if failure:
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                return failure
        time.sleep(0.05)


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # its data workers too
    for child in children:
        child.wait()
        if child.stdout:
            child.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=installed.command('tpu.local'),
        description='Run a command as several processes of one run, on the CPU of this machine.',
    )
    parser.add_argument('--processes', type=_positive, required=True)
    parser.add_argument('--devices-per-process', type=_positive, default=1)
    parser.add_argument('command', nargs='+', help='after --: what each process runs')
    options = parser.parse_args()
    sys.exit(
        launch(
            options.command,
            processes=options.processes,
            devices_per_process=options.devices_per_process,
        )
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{text} is not a positive number')
    return number


if __name__ == '__main__':
    main()

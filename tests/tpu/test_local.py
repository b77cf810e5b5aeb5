"""Two real processes that meet through JAX's distributed runtime."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llama_jax import runtime
from llama_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def start(script: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, '-m', 'tpu.local', *options, '--', sys.executable, str(script)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'default'}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def write(path: Path, source: str) -> Path:
    path.write_text(textwrap.dedent(source), encoding='utf-8')
    return path


@pytest.mark.multiprocess
def test_two_processes_sum_over_all_devices(tmp_path):
    script = write(
        tmp_path / 'script.py',
        """
        from llama_jax import runtime
        runtime.initialize()
        runtime.initialize()  # a second call changes nothing
        import jax, numpy as np
        from llama_jax import layout, mesh
        from jax.sharding import NamedSharding
        devices = mesh.make(mesh.MeshConfig(data=2))
        mine = np.full((2, 1), 10 ** jax.process_index(), np.float32)
        with jax.set_mesh(devices):
            x = jax.make_array_from_process_local_data(
                NamedSharding(devices, layout.act('BT')), mine)
            total = jax.jit(lambda x: x.sum())(x)
        print('sum', float(total), 'of', len(jax.devices()), 'devices,', jax.process_count())
        """,
    )
    child = start(script, '--processes', '2', '--devices-per-process', '2')
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, output
    lines = output.splitlines()
    for process in range(2):
        assert f'[{process}] sum 22.0 of 4 devices, 2' in lines


@pytest.mark.slow
def test_one_failure_ends_all_with_its_code(tmp_path):
    script = write(
        tmp_path / 'script.py',
        """
        import os, sys, time
        print('here')
        if os.environ['LLAMA_JAX_PROCESS'] == '1':
            sys.exit(7)
        time.sleep(600)
        """,
    )
    child = start(script, '--processes', '2')
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 7
    assert '[0] here' in output


def test_signal_reaches_every_process_once(tmp_path):
    script = write(
        tmp_path / 'script.py',
        """
        import os, signal, sys, time
        def leave(number, frame):
            print('caught', number)
            time.sleep(0.5)  # a second signal would be caught meanwhile
            sys.exit(128 + number)
        signal.signal(signal.SIGTERM, leave)
        print('ready')
        time.sleep(600)
        """,
    )
    child = start(script, '--processes', '2')
    lines = [child.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ['[0] ready\n', '[1] ready\n']
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=30)
    assert sorted(output.splitlines()) == ['[0] caught 15', '[1] caught 15']
    assert child.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_process_that_is_killed_ends_all(tmp_path):
    script = write(
        tmp_path / 'script.py',
        """
        import os, time
        print(os.getpid())
        time.sleep(600)
        """,
    )
    child = start(script, '--processes', '2')
    pids = dict(child.stdout.readline().split() for _ in range(2))
    os.kill(int(pids['[1]']), signal.SIGKILL)
    child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGKILL
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f'/proc/{pids["[0]"]}').exists():
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids['[0]']), 0)


def test_half_set_environment_is_refused(monkeypatch):
    monkeypatch.setenv(runtime.COORDINATOR, '127.0.0.1:1')
    monkeypatch.setenv(runtime.PROCESSES, '2')
    monkeypatch.delenv(runtime.PROCESS, raising=False)
    with pytest.raises(UserError, match='LLAMA_JAX_PROCESS is'):
        runtime.initialize()

"""The scripts that make an environment: which Python, and which accelerator."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.train.records import git_commit

TOOLS = Path(__file__).parents[1] / 'tools'
MINOR = sys.version_info.minor


@pytest.fixture(scope='module')
def accelerator():
    spec = importlib.util.spec_from_file_location('accelerator', TOOLS / 'accelerator.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['accelerator'] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules['accelerator']


class Driver:
    """libcuda.so.1, as far as it is asked."""

    def __init__(self, cuda, capabilities, code=0):
        self.cuda, self.capabilities, self.code = cuda, capabilities, code

    def cuInit(self, flags):  # noqa: N802
        return self.code

    def cuDriverGetVersion(self, out):  # noqa: N802
        out._obj.value = self.cuda

    def cuDeviceGetCount(self, out):  # noqa: N802
        out._obj.value = len(self.capabilities)

    def cuDeviceGetAttribute(self, out, attribute, device):  # noqa: N802
        out._obj.value = self.capabilities[device][{75: 0, 76: 1}[attribute]]


@pytest.mark.parametrize(
    'driver, wanted',
    [
        (Driver(13000, [(9, 0)]), 'cuda13'),  # 580 and an H100
        (Driver(13020, [(7, 5), (12, 0)]), 'cuda13'),
        (Driver(12080, [(9, 0)]), 'cuda12'),  # 570
        (Driver(13000, [(9, 0), (7, 0)]), 'cuda12'),  # a V100 beside it
        (Driver(12000, [(5, 2)]), 'cuda12'),  # 525
        (
            Driver(11080, [(8, 0)]),
            'CUDA up to 11.8, and JAX needs 12.0: install driver 525 or newer',
        ),
        (Driver(12040, [(3, 7)]), 'compute capability 3.7, and JAX needs 5.2 or more'),
        (Driver(0, [], code=100), ''),  # no device
        (Driver(12040, []), ''),
        (Driver(0, [], code=803), 'the NVIDIA driver does not start (cuInit says 803)'),
    ],
)
def test_the_driver_and_the_gpu_decide(accelerator, driver, wanted, monkeypatch, capsys):
    gpus = accelerator.gpus
    monkeypatch.setattr(accelerator, 'gpus', lambda: gpus(lambda name: driver))
    monkeypatch.setattr(accelerator.sys, 'platform', 'linux')
    monkeypatch.setattr(accelerator.platform, 'machine', lambda: 'aarch64')
    found = wanted if wanted.startswith('cuda') or not wanted else ''
    assert accelerator.main('auto') == found
    told = capsys.readouterr().err
    assert bool(told) == bool(wanted) and (found or wanted) in told
    if found:
        assert accelerator.main('cuda') == found
    else:
        with pytest.raises(accelerator.NoneFits) as refused:
            accelerator.main('cuda')
        assert (wanted or 'there is no NVIDIA GPU here') in str(refused.value)


def test_without_a_driver_it_is_the_cpu(accelerator, monkeypatch, capsys):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(accelerator.os.path, 'exists', lambda path: False)
    assert accelerator.gpus(missing) is None
    monkeypatch.setattr(accelerator.os.path, 'exists', lambda path: path == '/dev/nvidia0')
    with pytest.raises(accelerator.NoneFits, match=r'libcuda.so.1 is not found: .*--gpus all'):
        accelerator.gpus(missing)
    monkeypatch.setattr(accelerator.sys, 'platform', 'darwin')
    monkeypatch.setattr(accelerator, 'gpus', ctypes.CDLL)  # not asked
    assert accelerator.main('auto') == '' and capsys.readouterr().err == ''


@pytest.mark.parametrize(
    'asked, code, out, words',
    [
        ('cpu', 0, '\n', ''),
        ('cuda12', 0, 'cuda12\n', ''),
        ('tpu', 0, 'tpu\n', ''),
        ('gpu', 1, '', 'error: ACCELERATOR=gpu: it is one of auto, cuda, cuda12, cuda13, tpu, cpu'),
    ],
)
def test_what_is_named_is_taken(asked, code, out, words):
    done = subprocess.run(
        [sys.executable, '-I', TOOLS / 'accelerator.py', asked], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, out, words)


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def find(tmp_path):
    """What tools/find_python.sh prints where pyenv has shims for two versions, of which neither is
    selected, and one is installed."""
    shims, versions = tmp_path / 'shims', tmp_path / 'root' / 'versions'
    for name in ('python3', f'python3.{MINOR}', 'python3.10'):
        script(shims / name, f'echo "pyenv: {name}: command not found" >&2; exit 127')
    script(shims / 'pyenv', f'echo "{tmp_path}/root"')
    script(versions / f'3.{MINOR}.1/bin/python3', f'exec "{sys.executable}" "$@"')
    script(versions / '3.10.13/bin/python3', 'exit 1')  # too old, says the question

    def find(name):
        done = subprocess.run(
            ['sh', TOOLS / 'find_python.sh', name],
            capture_output=True,
            text=True,
            env={**os.environ, 'PATH': f'{shims}:/usr/bin:/bin'},
        )
        return done.returncode, done.stdout.strip().removeprefix(f'{versions}/')

    return find


def test_a_shim_of_pyenv_that_does_not_start_is_passed_over(find):
    installed = (0, f'3.{MINOR}.1/bin/python3')
    assert find(f'python3.{MINOR}') == installed
    assert find(sys.executable) == (0, sys.executable)
    assert find('python3.10') == find('/no/python') == find('python3.19') == (1, '')
    if not any(Path(f'/usr/bin/python3.{minor}').exists() for minor in (11, 12, 13)):
        assert find('python3') == installed


def test_a_python_that_does_not_run_is_one_line(tmp_path):
    done = subprocess.run(
        ['sh', TOOLS / 'venv.sh', '/no/python', tmp_path / 'venv'], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, '') and done.stderr == (
        'error: /no/python does not run: install Python 3.11 or newer, or name one '
        '(make PYTHON=...)\n'
    )
    old = script(tmp_path / 'python3.9', 'case $* in *version_info\\ *) exit 1;; esac; echo 3.9')
    done = subprocess.run(
        ['sh', TOOLS / 'venv.sh', old, tmp_path / 'venv'], capture_output=True, text=True
    )
    assert done.returncode == 1 and f'{old} is Python 3.9: 3.11 or newer is needed' in done.stderr


def test_the_commit_is_that_of_the_clone_and_of_none_around_it(tmp_path, monkeypatch):
    """A virtual environment lies within the clone of something else, such as pyenv's own."""
    git = ['git', '-c', 'user.name=x', '-c', 'user.email=x@example.org']
    (tmp_path / 'around/site').mkdir(parents=True)
    try:
        subprocess.run([*git, 'init', '-q'], cwd=tmp_path / 'around', check=True)
    except (OSError, subprocess.CalledProcessError):  # there is no git here
        assert git_commit(tmp_path / 'around') is None
        return
    commit = ['commit', '-q', '--allow-empty', '-m', 'x']
    subprocess.run([*git, *commit], cwd=tmp_path / 'around', check=True)
    found = git_commit(tmp_path / 'around')
    assert found is not None and len(found) == 40
    assert git_commit(tmp_path / 'around/site') is None
    monkeypatch.setenv('GIT_DIR', str(tmp_path / 'around/.git'))
    assert git_commit(tmp_path / 'around/site') is None

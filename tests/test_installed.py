"""What pip installs: a whole wheel, made of a whole archive of the sources, whose `llama-jax` runs
from anywhere and meets no package of another by the name of one of ours."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from llama_jax import __main__ as command
from llama_jax import installed

ROOT = Path(__file__).parents[1]
PACKAGES = ('llama_jax', 'configs', 'experiments', 'tpu')
BESIDE = ('benchmarks', 'constraints', 'docs', 'tests', 'tools', '.ci')
FILES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'Makefile', 'LICENSE')
PAGES = ('README.md', 'README.zh-CN.md', 'CONTRIBUTING.md')


def files(root, *tops):
    """Paths of what belongs to the project."""
    found = (path for top in tops for path in (root / top).rglob('*'))
    return {
        path.relative_to(root).as_posix()
        for path in found
        if path.is_file() and '__pycache__' not in path.parts
    }


def python(*arguments, cwd, **environment):
    """What a Python prints, in a directory that is not ours."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
    )


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    """The archive of the sources, of a copy: a build leaves files where it works."""
    copy = tmp_path_factory.mktemp('sources') / 'clone'
    for top in (*PACKAGES, *BESIDE):
        shutil.copytree(ROOT / top, copy / top, ignore=shutil.ignore_patterns('__pycache__'))
    for name in (*FILES, *PAGES):
        shutil.copy(ROOT / name, copy / name)
    code = 'from setuptools import build_meta; print(build_meta.build_sdist("."))'
    built = python('-c', code, cwd=copy)
    assert built.returncode == 0, built.stderr
    return copy / built.stdout.splitlines()[-1]


@pytest.fixture(scope='module')
def wheel(archive):
    """A wheel of what the archive holds."""
    with tarfile.open(archive) as packed:
        packed.extractall(archive.parent / 'unpacked', filter='data')
    (sources,) = (archive.parent / 'unpacked').iterdir()
    code = 'from setuptools import build_meta; print(build_meta.build_wheel("."))'
    built = python('-c', code, cwd=sources)
    assert built.returncode == 0, built.stderr
    return sources / built.stdout.splitlines()[-1]


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    """A directory that the wheel is installed in, beside packages of somebody else."""
    target = tmp_path_factory.mktemp('site')
    arguments = ('install', '--quiet', '--no-deps', '--no-index', '--target', target, wheel)
    done = python('-m', 'pip', *arguments, cwd=target)
    assert done.returncode == 0, done.stderr
    for name in ('configs', 'experiments', 'tpu'):
        (target / f'{name}.py').write_text(f'raise RuntimeError("the {name} of somebody else")')
    return target


def test_the_archive_of_the_sources_is_whole(archive):
    with tarfile.open(archive) as packed:
        names = {name.partition('/')[2] for name in packed.getnames()}
    wanted = files(ROOT, *PACKAGES, *BESIDE) | {*FILES, *PAGES}
    assert wanted - names == set() and 'llama_jax/serve/page/page.js' in names


def test_a_wheel_has_all_of_it_within_one_package(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if '.dist-info/' not in name}
    scripts = {f'llama_jax/scripts/{name}' for name in files(ROOT, 'configs', 'experiments', 'tpu')}
    assert names == files(ROOT, 'llama_jax') | scripts
    assert {'llama_jax/py.typed', 'llama_jax/serve/page/index.html'} < names


@pytest.mark.slow
def test_llama_jax_runs_from_anywhere(site, tmp_path):
    script = site / 'bin' / 'llama-jax'
    listed = python(script, '--help', cwd=tmp_path, PYTHONPATH=str(site))
    assert (listed.returncode, listed.stderr) == (0, '')
    assert '  pretrain  Pre-train a model\n' in listed.stdout
    assert [line.split()[0] for line in listed.stdout.splitlines()[2:-2]] == list(command.COMMANDS)
    (tmp_path / 'mine.py').write_text(
        'from configs import quickstart\nsmall = quickstart.quickstart'
    )
    unread = subprocess.run(
        f'{sys.executable} {script} --help | true',
        shell=True,
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(site)},
        capture_output=True,
        text=True,
    )
    assert unread.stderr == ''
    refused = python(
        *(script, 'pretrain', 'mine.py:small', '--train.stpes', '3'),
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert refused.returncode == 2 and refused.stderr == (
        'error: there is no option --train.stpes: did you mean --train.steps? (all: llama-jax '
        'pretrain mine.py:small --help)\n'
    )


def test_its_commands_are_the_scripts(monkeypatch, capsys):
    scripts = {
        f'{path.parent.name}.{path.stem}'
        for top in ('experiments', 'tpu')
        for path in (ROOT / top).glob('*.py')
        if "if __name__ == '__main__':" in path.read_text('utf-8')
    }
    assert set(command.COMMANDS.values()) == scripts
    for arguments, code, words in (
        (['pretain'], 2, "error: llama-jax has no command 'pretain': did you mean pretrain?\n"),
        ([], 2, ''),
    ):
        monkeypatch.setattr(sys, 'argv', ['llama-jax', *arguments])
        with pytest.raises(SystemExit) as left:
            command.main()
        assert left.value.code == code and capsys.readouterr().err == words


@pytest.mark.parametrize(
    'started, within, wanted',
    [
        ('/clone/experiments/pretrain.py', False, 'python -m experiments.report'),
        ('/somewhere/bin/llama-jax', False, 'llama-jax report'),
        ('/site/llama_jax/scripts/experiments/pretrain.py', True, 'llama-jax report'),
        ('/site/llama_jax/__main__.py', True, 'python -m llama_jax report'),
    ],
)
def test_commands_are_named_as_they_can_be_typed(started, within, wanted, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', [started, 'quickstart'])
    monkeypatch.setattr(installed, '_WITHIN', tmp_path if within else tmp_path / 'none')
    assert installed.command('report') == wanted
    plan = wanted.replace('experiments.', 'tpu.').replace('report', 'plan')
    assert installed.command('tpu.plan') == plan
    assert installed.root() == (tmp_path if within else ROOT)
    how = installed.extra('weights')
    assert ('tokenizers>=' in how and "'gguf>=" in how) if within else how.endswith("'.[weights]'")
    assert 'starlette' not in how


@pytest.mark.parametrize(
    'argv, orig_argv, wanted',
    [
        (
            ['/somewhere/bin/llama-jax', 'quickstart'],
            ['/bin/python3', '/somewhere/bin/llama-jax', 'pretrain', 'quickstart'],
            ['llama-jax', 'pretrain', 'quickstart'],
        ),
        (
            ['/clone/experiments/pretrain.py', 'x'],
            ['/bin/python3', '-m', 'experiments.pretrain', 'x'],
            ['python', '-m', 'experiments.pretrain', 'x'],
        ),
        (
            ['experiments/pretrain.py', 'x'],
            ['/bin/python3', 'experiments/pretrain.py', 'x'],
            ['python', 'experiments/pretrain.py', 'x'],
        ),
        (  # started by another program
            ['/somewhere/bin/llama-jax', 'x'],
            ['/bin/python3', '-m', 'pdb', 'llama-jax', 'x'],
            ['python', '-m', 'pdb', 'llama-jax', 'x'],
        ),
    ],
)
def test_the_command_line_is_recorded_without_paths(argv, orig_argv, wanted, monkeypatch):
    monkeypatch.setattr(sys, 'orig_argv', orig_argv)
    monkeypatch.setattr(sys, 'argv', argv)
    assert installed.typed() == wanted

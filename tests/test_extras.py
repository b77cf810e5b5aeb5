"""setup.py lists what is imported: each directory gets along with the extras that its documents
name, and what is imported when a module is loaded is there without an extra, or is its directory's
whole purpose."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
OWN = {'llama_jax', 'configs', 'experiments', 'tpu', 'benchmarks', 'tests'}
DISTRIBUTIONS = {
    'absl': 'absl-py',
    'orbax': 'orbax-checkpoint',
    'sklearn': 'scikit-learn',
    'yaml': 'pyyaml',
}
"""Of packages that are imported by another name."""

# The extras that a directory may use, and those without which it is of no use. The first directory
# that a file lies in counts.
EXTRAS = {
    'llama_jax/serve': ('serve', 'serve'),
    'llama_jax/text': ('weights', 'weights'),  # jinja2 alone, where a template is drawn
    'llama_jax/convert': ('weights', ''),
    'llama_jax/data': ('formats', ''),
    'llama_jax/evaluate': ('eval compare', 'eval'),
    'llama_jax/report': ('compare', ''),
    'llama_jax/train': ('wandb', ''),
    'llama_jax': ('', ''),
    'configs': ('', ''),
    'experiments': ('weights serve', ''),
    'tpu': ('tpu', ''),
    'benchmarks': ('test compare parity', ''),
    'tests/parity': ('test compare parity', 'test'),
    'tests': ('test compare', 'test compare'),
}
ELSEWHERE = {'mteb'}
"""What encoder.py is an adapter for: whoever uses it has it."""


def imports(node, load=True):
    """(package, whether it is imported when the module is loaded)"""
    for inner in ast.iter_child_nodes(node):
        names = []
        if isinstance(inner, ast.Import):
            names = [alias.name for alias in inner.names]
        elif isinstance(inner, ast.ImportFrom) and not inner.level:
            names = [inner.module]
        yield from ((name.split('.')[0], load) for name in names)
        later = isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(inner, ast.If) and 'TYPE_CHECKING' in ast.unparse(inner.test)
        )
        yield from imports(inner, load and not later)


def distribution(package):
    return DISTRIBUTIONS.get(package, package).lower().replace('_', '-')


def names(requirements):
    found = (re.match(r'[\w.-]+', requirement)[0] for requirement in requirements)
    return {name.lower().replace('_', '-') for name in found}


@pytest.fixture(scope='module')
def listed():
    """Names of what setup.py lists, by extra; '' are those that are always there."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, 'find_packages', lambda **_: [])
        patch.setattr(setuptools, 'setup', lambda **settings: found.update(settings))
        runpy.run_path(str(ROOT / 'setup.py'))
    extras = {extra: names(lines) for extra, lines in found['extras_require'].items()}
    return {'': names(found['install_requires']), **extras}


def undeclared(tree, directory, listed):
    used, needed = ({'', *extras.split()} for extras in EXTRAS[directory])
    for package, load in imports(tree):
        if package in OWN | ELSEWHERE | sys.stdlib_module_names:
            continue
        if not any(distribution(package) in listed[extra] for extra in (needed if load else used)):
            yield package


@pytest.mark.slow
def test_every_import_is_of_a_package_that_is_listed(listed):
    found = []
    for top in sorted(OWN):
        for path in sorted((ROOT / top).rglob('*.py')):
            place = path.relative_to(ROOT).as_posix()
            directory = next(name for name in EXTRAS if place.startswith(f'{name}/'))
            for package in undeclared(ast.parse(path.read_text('utf-8')), directory, listed):
                found.append(f'{place} imports {package}')
    assert not found
    assert set(EXTRAS) == {name for name in EXTRAS if (ROOT / name).is_dir()}


@pytest.mark.parametrize(
    'directory, source, found',
    [
        ('llama_jax', 'import jax.numpy, os', []),
        ('llama_jax', 'import tokenizers', ['tokenizers']),
        ('llama_jax/convert', 'def f():\n  import gguf', []),
        ('llama_jax/convert', 'import gguf', ['gguf']),
        ('llama_jax/report', 'if x:\n  from sklearn import a', ['sklearn']),
        ('tests/parity', 'def f():\n  from orbax.checkpoint import v1\n  import torch', []),
    ],
)
def test_a_missing_one_is_seen(listed, directory, source, found):
    assert list(undeclared(ast.parse(source), directory, listed)) == found


def test_what_is_listed_has_a_pin(listed):
    """In both lines; what has hundreds of MB of its own for other machines stands apart."""
    apart = {'wandb'}
    for line in ('jax-0.10', 'jax-0.12'):
        text = (ROOT / f'constraints/{line}.txt').read_text()
        pinned = dict(part.split('==') for part in text.split())
        assert not set().union(*listed.values()) - pinned.keys() - apart
        cuda = (ROOT / f'constraints/cuda-{line}.txt').read_text()
        for version in ('12', '13'):
            assert f'jax-cuda{version}-plugin=={pinned["jax"]}\n' in cuda
            assert f'jax-cuda{version}-pjrt=={pinned["jax"]}\n' in cuda

"""How this copy of the project is installed, and so what a person types to run or to extend it.

A clone has experiments/, configs/ and tpu/ beside this package. A wheel has them within it, in a
directory that only `llama-jax` puts on the path: as packages of their own, such general names would
overwrite those of others.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

NAME = 'llama-jax'
_WITHIN = Path(__file__).parent / 'scripts'


def root() -> Path:
    """The directory that holds experiments/, configs/ and tpu/."""
    return _WITHIN if _WITHIN.is_dir() else Path(__file__).parents[1]


def command(script: str) -> str:
    """What starts a script of experiments/, or one of tpu/ by its dotted name."""
    module = script if '.' in script else f'experiments.{script}'
    name = module.rpartition('.')[2]
    started = Path(sys.argv[0])
    if started.parts[-2:] == ('llama_jax', '__main__.py'):
        return f'python -m llama_jax {name}'
    if _WITHIN.is_dir() or started.name == NAME:
        return f'{NAME} {name}'
    return f'python -m {module}'


def typed() -> list[str]:
    """The command line of this process, without paths of the interpreter and of `llama-jax`."""
    if Path(sys.argv[0]).name == NAME and sys.argv[0] in sys.orig_argv:
        return [NAME, *sys.orig_argv[sys.orig_argv.index(sys.argv[0]) + 1 :]]
    return ['python', *sys.orig_argv[1:]]


def extra(name: str) -> str:
    """The command that installs what an extra of setup.py lists."""
    if not _WITHIN.is_dir():
        return f"pip install -e '.[{name}]'"
    needed = []
    for line in importlib.metadata.requires('llama_jax') or []:
        requirement, _, marker = line.partition(';')
        if re.search(f'extra == [\'"]{name}[\'"]', marker):
            needed.append(f"'{requirement.strip()}'")
    return f'pip install {" ".join(needed)}'

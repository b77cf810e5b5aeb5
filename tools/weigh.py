"""What an installation weighs: MB on disk of the packages that setup.py lists, and what each extra
adds to them.

usage: .venv-parity/bin/python tools/weigh.py

Counts what is installed in the environment of the Python that runs it; what is missing is named.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
from collections.abc import Iterable

from packaging.requirements import Requirement


def closure(requirements: Iterable[str], extra: str = '') -> tuple[set[str], set[str]]:
    """The packages that these bring, by name; and those of them that are not installed."""
    found: set[str] = set()
    missing: set[str] = set()
    todo = [(Requirement(text), extra) for text in requirements]
    seen = set()
    while todo:
        requirement, asked = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({'extra': asked}):
            continue
        name = re.sub(r'[-_.]+', '-', requirement.name).lower()
        for wanted in ('', *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                below = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                missing.add(name)
                continue
            found.add(name)
            todo += [(Requirement(text), wanted) for text in below]
    return found, missing


def megabytes(names: Iterable[str]) -> float:
    """On disk, compiled Python included."""
    total = 0
    for name in names:
        for file in metadata.files(name) or []:
            path = str(file.locate())
            if os.path.isfile(path):
                total += os.path.getsize(path)
    return total / 1e6


def main() -> None:
    own = metadata.metadata('llama_jax')
    needed = metadata.requires('llama_jax') or []
    core, missing = closure(needed)
    print(f'{"core":<10}{len(core):>4} packages {megabytes(core):8,.0f} MB')
    for extra in sorted(own.get_all('Provides-Extra') or []):
        found, missing = closure(needed, extra)
        missing = {name for name in missing if not name.startswith('nvidia-')}
        left_out = f', without {", ".join(sorted(missing))}' if missing else ''
        more = found - core
        print(f'{extra:<10}{len(more):>4} more     {megabytes(more):8,.0f} MB{left_out}')


if __name__ == '__main__':
    main()

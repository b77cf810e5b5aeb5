"""Which files a source names: files, directories, globs, and what is left out of them."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama_jax.errors import UserError
from llama_jax.paths import local

_MAGIC = re.compile(r'[*?[]')


class Found(NamedTuple):
    """A file that a pattern matches."""

    path: Path
    name: str  # the path below what the pattern has fixed: it stays when the whole is moved
    of_directory: bool  # whether a directory was named, and not the file or a glob


def matching(files: tuple[str, ...], exclude: tuple[str, ...] = ()) -> list[Found]:
    """All that `files` name: in their order, sorted in each, every file once.

    A name of a file or directory that exists is taken literally, brackets and all; a directory
    means all files in it and below, hidden ones left out. `exclude` are globs for the names, or
    for their last parts. Raises UserError for a pattern without a match.
    """
    if not files:
        raise UserError(
            'text_files without files: name some, e.g. --data.sources.0.files notes/*.txt'
        )
    found: dict[str, Found] = {}
    useless = set(exclude)
    for pattern in files:
        path = local(pattern, 'the file')
        matches = sorted(_matches(path), key=lambda match: match.name)
        if not matches:
            raise UserError(f'no file matches {pattern!r}: check the path (** looks in folders)')
        for match in matches:
            excluded = [out for out in exclude if _is(match.name, out)]
            useless.difference_update(excluded)
            if not excluded:
                found.setdefault(os.path.abspath(match.path), match)
    if useless:
        raise UserError(f'exclude {sorted(useless)[0]!r} matches no file: check it or leave it out')
    if not found:
        raise UserError(f'exclude leaves none of the files {", ".join(files)}')
    return list(found.values())


def _is(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(
        os.path.basename(name), pattern
    )


def _matches(path: Path) -> Iterator[Found]:
    if path.is_file():
        yield Found(path, path.name, False)
    elif path.is_dir():
        yield from _below(path)
    else:
        fixed = _fixed(path)
        for match in glob.iglob(str(path), recursive=True):
            if os.path.isfile(match):
                yield Found(Path(match), os.path.relpath(match, fixed), False)


def _below(root: Path) -> Iterator[Found]:
    """Folders that links lead to are searched as well, each once; those below `root` are found
    without a link, but for hidden ones, and those above it are another's."""
    whole = Path(os.path.realpath(root))
    seen = {str(whole)}
    for directory, folders, names in os.walk(root, followlinks=True):
        kept = []
        for folder in sorted(folders):
            inner = os.path.join(directory, folder)
            real = Path(os.path.realpath(inner))
            inside = real.is_relative_to(whole) and not _hidden(real.relative_to(whole))
            other = os.path.islink(inner) and (inside or whole.is_relative_to(real))
            if not folder.startswith('.') and not other and str(real) not in seen:
                seen.add(str(real))
                kept.append(folder)
        folders[:] = kept
        for name in names:
            path = Path(directory, name)
            if not name.startswith('.') and path.is_file():
                yield Found(path, os.path.relpath(path, root), True)


def _hidden(path: Path) -> bool:
    return any(part.startswith('.') for part in path.parts)


def _fixed(path: Path) -> str:
    """The directory that a glob begins with."""
    parts = []
    for part in path.parts[:-1]:
        if _MAGIC.search(part):
            break
        parts.append(part)
    return os.path.join(*parts) if parts else '.'

"""Sources of data in short, for the command line: `--data.mix 'web/*.jsonl=3' 'books/*.txt=1'`."""

import glob
import math
import os
import re
from collections.abc import Sequence

from llama_jax.data.config import Source
from llama_jax.errors import UserError

OPTIONS = ('data.mix', 'data.files')

_NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf', re.IGNORECASE)
_FILES = re.compile(
    r'[*?\[\\]|^[./~]|\.(txt|md|jsonl?|ndjson|parquet|gz|zstd?|xz|bz2)$', re.IGNORECASE
)


def from_command_line(arguments: Sequence[str]) -> tuple[tuple[Source, ...], list[str]]:
    """The sources that `--data.mix` or `--data.files` name, if any, and the other arguments.

    The sources stand in for those of the configuration; options such as `--data.sources.0.field`
    then change them. Raises UserError for both options at once, and for a wrong weight.
    """
    given: dict[str, list[str]] = {}
    others: list[str] = []
    taking: list[str] | None = None
    for argument in arguments:
        if argument.startswith('--'):
            name, _, value = argument.partition('=')
            taking = None
            if name[2:] in OPTIONS:
                taking = given.setdefault(name[2:], [])
                taking += [value] if value else []
                continue
        if taking is not None:
            taking.append(argument)
        else:
            others.append(argument)
    for name, values in given.items():
        if not values:
            raise UserError(f"--{name} names nothing: add files, such as --{name} 'books/*.txt'")
    if len(given) > 1:
        raise UserError('--data.files is one source and --data.mix several: give one of the two')
    if 'data.files' in given:
        return (Source('text_files', files=tuple(given['data.files'])),), others
    return tuple(source(item) for item in given.get('data.mix', ())), others


def source(item: str) -> Source:
    """What `NAME=WEIGHT` or `NAME` says (weight 1). A name is a file, a directory or a glob; a data
    set such as `python_corpus/stdlib_code`; or a directory with a prepared data set.

    Raises UserError for a weight that is no number above 0.
    """
    name, equals, weight = item.rpartition('=')
    if not equals or (not _NUMBER.fullmatch(weight) and _exists(item)):
        name, weight = item, '1'  # a name may hold '=' itself
    if not _NUMBER.fullmatch(weight) or not 0 < float(weight) < math.inf:
        raise UserError(
            f'--data.mix {item!r}: {weight!r} is no weight; write NAME=NUMBER with a number above '
            "0, such as 'books/*.txt=2'"
        )
    if not name:
        raise UserError(f'--data.mix {item!r} names no source; write NAME=NUMBER')
    if _is_files(name):
        return Source('text_files', float(weight), files=(name,))
    return Source(name, float(weight))


def _exists(name: str) -> bool:
    path = os.path.expanduser(name)
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


def _is_files(name: str) -> bool:
    if name.partition('/')[0] == 'python_corpus':
        return False
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # of files, or of a prepared data set, with or without its version
        described = (path, *(entry.path for entry in os.scandir(path) if entry.is_dir()))
        return not any(os.path.exists(f'{one}/dataset_info.json') for one in described)
    return os.path.exists(path) or bool(_FILES.search(name))

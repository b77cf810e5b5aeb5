"""Sources of data in short, for the command line: `--data.mix 'web/*.jsonl=3' 'books/*.txt=1'` to
train on, `--data.validate 'zh=sanguo/*.txt' 'en=books/*.txt'` to validate on."""

import dataclasses
import glob
import math
import os
import re
from collections import Counter
from collections.abc import Sequence

from llama_jax.data.config import MADE_HERE, Source
from llama_jax.errors import UserError

OPTIONS = ('data.mix', 'data.files', 'data.validate')

_NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf', re.IGNORECASE)
_LABEL = re.compile(r'[\w.-]+')
_FILES = re.compile(
    r'[*?\[\\]|^[./~]|\.(txt|md|jsonl?|ndjson|parquet|gz|zstd?|xz|bz2)$', re.IGNORECASE
)


def from_command_line(
    arguments: Sequence[str],
) -> tuple[dict[str, tuple[Source, ...]], list[str]]:
    """The 'sources' that `--data.mix` or `--data.files` name and the 'validation' of
    `--data.validate`, of these what is given, and the other arguments.

    They stand in for those of the configuration; options such as `--data.sources.0.field` then
    change them. Raises UserError for `--data.mix` and `--data.files` at once, a wrong weight, and
    two sets of one name.
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
    if {'data.files', 'data.mix'} <= set(given):
        raise UserError('--data.files is one source and --data.mix several: give one of the two')
    found: dict[str, tuple[Source, ...]] = {}
    if 'data.files' in given:
        found['sources'] = (Source('text_files', files=tuple(given['data.files'])),)
    if 'data.mix' in given:
        found['sources'] = tuple(map(source, given['data.mix']))
    if 'data.validate' in given:
        found['validation'] = named_sets(given['data.validate'], '--data.validate')
    return found, others


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
    return dataclasses.replace(_source(name), weight=float(weight))


def named_sets(items: Sequence[str], option: str) -> tuple[Source, ...]:
    """What each `LABEL=NAME` or `NAME` of `option` says, with names as in `source`.

    Raises UserError for an empty name and for two of one label.
    """
    sets = []
    for item in items:
        label, equals, name = item.partition('=')
        if not equals or not _LABEL.fullmatch(label) or _exists(item):
            label, name = '', item  # a name may hold '=' itself
        if not name:
            raise UserError(f"{option} {item!r} names nothing; write LABEL='books/*.txt'")
        sets.append(dataclasses.replace(_source(name), label=label))
    twice = [label for label, n in Counter(one.label for one in sets).items() if label and n > 1]
    if twice:
        raise UserError(f'{option} has two sets called {twice[0]!r}: give each a name of its own')
    return tuple(sets)


def _source(name: str) -> Source:
    return Source('text_files', files=(name,)) if _is_files(name) else Source(name)


def _exists(name: str) -> bool:
    path = os.path.expanduser(name)
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


def _is_files(name: str) -> bool:
    if name.partition('/')[0] in MADE_HERE:
        return False
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # of files, or of a prepared data set, with or without its version
        described = (path, *(entry.path for entry in os.scandir(path) if entry.is_dir()))
        return not any(os.path.exists(f'{one}/dataset_info.json') for one in described)
    return os.path.exists(path) or bool(_FILES.search(name))

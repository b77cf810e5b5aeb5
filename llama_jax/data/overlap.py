"""Held-out text that is trained on as well: a figure of it tells of memory."""

import logging
import os

from llama_jax.data import find
from llama_jax.data.config import FILES, DataConfig, Source, labels
from llama_jax.errors import UserError

log = logging.getLogger(__name__)


def warn_of_overlap(config: DataConfig) -> None:
    """Say in one line each which validation sets are training data, as far as names tell: the same
    files or data set, in the same split. Copies and slices of a split are not looked into."""
    validation = config.of('validation')
    for label, held in zip(labels(validation), validation, strict=True):
        for trained in config.of('train'):
            both = _both(held, trained)
            if both and _share_a_split(held.split or '', trained.split or ''):
                log.warning(
                    'validation set %s: %s is trained on as well (split %s, of which validation '
                    'reads %s), so its figures are too good; hold other text out',
                    *(label, both, trained.split, held.split),
                )
                break


def _both(held: Source, trained: Source) -> str:
    """What both read; '' where it is nothing."""
    if not {held.name, trained.name} <= {*FILES}:
        if held.name != trained.name:
            return ''
        return held.name if held.data_dir == trained.data_dir else ''
    same = sorted(_paths(held) & _paths(trained))
    more = f' and {len(same) - 1} more' if len(same) > 1 else ''
    return f'{same[0]}{more}' if same else ''


def _paths(source: Source) -> set[str]:
    """The files of a source, links resolved. None where they are not there: who reads them says so,
    and a run may be evaluated where those it was trained on are no more."""
    try:
        return {os.path.realpath(one.path) for one in find.matching(source.files, source.exclude)}
    except UserError:
        return set()


def _share_a_split(one: str, other: str) -> bool:
    """Whether 'train', 'all', 'train+test' and the like have a split in common."""
    first, second = ({part.partition('[')[0] for part in x.split('+')} for x in (one, other))
    if '[' in one and '[' in other:
        return False  # such as train[:99%] and train[99%:]
    return 'all' in first | second or bool(first & second)

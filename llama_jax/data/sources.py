"""Opening the data sets of a configuration: prepared on first use, read by index ever after."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from llama_jax.data import prepare, python_corpus, schemas
from llama_jax.data.config import FILES, MADE_HERE, DataConfig, Source, cache_dir
from llama_jax.data.documents import Documents, RecordDocuments
from llama_jax.data.record import Record, Text
from llama_jax.data.synthetic import builder as synthetic_builder
from llama_jax.data.text_files import RECORDS
from llama_jax.errors import UserError

_FORMAT = 'array_record'


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The sources of a mixture, opened for one split."""

    sources: tuple[Documents, ...]
    weights: tuple[float, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Documents of each source."""
        return tuple(len(source) for source in self.sources)

    @property
    def digest(self) -> str:
        """Hash of the contents' identities and of the weights, hexadecimal."""
        facts = ([source.digest for source in self.sources], self.weights)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def open_sources(config: DataConfig, split: str, reads: type[Record] = Text) -> Corpus:
    """Opens (and where necessary prepares) every source. `split` is 'train' or 'validation';
    `reads` is what the objective reads: for all but texts the sources are RecordDocuments.

    Raises UserError for a data set, split, field or file that is not there, for one that is not
    stored as array_record, and for a split without documents.
    """
    check(config, reads)
    chosen = config.of(split)
    sources = tuple(
        _documents(builder(source, reads=reads), source, source.split or '', reads)
        for source in chosen
    )
    return Corpus(sources, tuple(source.weight for source in chosen))


def check(config: DataConfig, reads: type[Record] = Text) -> None:
    """Raises UserError for sources without weight, for settings without effect, and for records
    where an objective reads texts."""
    if not config.sources:
        raise UserError('no data: data.sources is empty, give at least one source')
    _check_reading(config, reads)
    named = {'sources': config.sources, 'validation': config.validation}
    for option, number, source in (
        (option, number, source)
        for option, sources in named.items()
        for number, source in enumerate(sources)
    ):
        if not 0 < source.weight < math.inf:
            raise UserError(f'the weight of {source.name!r} is {source.weight}: set one above 0')
        defaults = Source(source.name)
        if option == 'validation' and source.weight != defaults.weight:
            raise UserError(
                f'weight has no effect on the validation set {source.name!r}, of which the tokens '
                'count: leave it out'
            )
        for setting in ('files', 'exclude', 'encoding', 'document_characters'):
            same = getattr(source, setting) == getattr(defaults, setting)
            if source.name not in FILES and not same:
                raise UserError(
                    f'{setting} has no effect on the source {source.name!r}: add '
                    f'--data.{option}.{number}.name text_files, or leave it out'
                )
        for setting in ('rename',) if reads is Text else ('field', 'document_characters'):
            if getattr(source, setting) != getattr(defaults, setting):
                raise UserError(
                    f'--data.{option}.{number}.{setting.replace("_", "-")} has no effect where the '
                    f'objective reads {schemas.NAMES[reads]}: leave it out'
                    + (', or set rename' if setting == 'field' else '')
                )
        _renames(source)


def _check_reading(config: DataConfig, reads: type[Record]) -> None:
    what = schemas.NAMES[reads]
    if reads is Text:
        defaults = DataConfig()
        for setting in ('chat', 'too_long', 'bad_records'):
            if getattr(config, setting) != getattr(defaults, setting):
                raise UserError(
                    f'--data.{setting.replace("_", "-")} has no effect where the objective reads '
                    f'{what}: leave it out'
                )
        for source in (*config.sources, *config.validation):
            if source.name == RECORDS:
                raise UserError(
                    f'the source {RECORDS!r} ({", ".join(source.files)}) yields records, and the '
                    f'objective reads {what}: name it text_files, whose `field` is the text, or '
                    'choose an objective that reads records'
                )


def _renames(source: Source) -> tuple[tuple[str, str], ...]:
    found = []
    for item in source.rename:
        name, equals, field = item.partition('=')
        if not (name and equals and field):
            raise UserError(
                f'rename {item!r} of {source.name!r} is no NAME=FIELD, such as target=docstring'
            )
        found.append((name, field))
    return tuple(found)


def documents(config: DataConfig, split: str) -> Iterator[str]:
    """Every document of the split 'train' or 'validation' once, in stored order."""
    for source in open_sources(config, split).sources:
        for index in range(len(source)):
            yield source[index]


def builder(
    source: Source, processes: int | None = None, *, reads: type[Record] = Text
) -> tfds.core.DatasetBuilder:
    """The data set of a source, prepared where it is not there yet (by `processes`; None: one a
    core)."""
    if source.name in FILES and reads is not Text:
        source = dataclasses.replace(source, name=RECORDS)
    name, _, config = source.name.partition('/')
    if name in MADE_HERE:
        return _made_here(source, name, config)
    if name in FILES:
        return prepare.open_prepared(prepare.text_data_set(source, processes))
    return _stored(source)


_BUILDERS: dict[str, tuple[type[tfds.core.GeneratorBasedBuilder], Callable[[str], str]]] = {
    'python_corpus': (python_corpus.PythonCorpus, python_corpus.fingerprint),
    'synthetic': (synthetic_builder.Synthetic, synthetic_builder.fingerprint),
}
"""Builders of this package, and what says whether one was prepared from what is there now."""


def _made_here(source: Source, name: str, config: str) -> tfds.core.DatasetBuilder:
    kind, fingerprint = _BUILDERS[name]
    known = [c.name for c in kind.BUILDER_CONFIGS]
    if config not in known:
        raise UserError(f'no data set {source.name!r}: {name}/ has {", ".join(known)}')
    if source.data_dir is not None:  # somebody prepared it there, for every host the same
        return _stored(source)

    def make_builder(data_dir: str) -> tfds.core.GeneratorBasedBuilder:
        return kind(config=config, data_dir=data_dir, file_format=_FORMAT)

    root = cache_dir() / 'datasets' / fingerprint(config) / config
    prepare.prepared(root, source.name, functools.partial(prepare.by_builder, make_builder))
    try:
        with prepare.quiet_absl():
            return make_builder(str(root))
    except Exception as error:  # of JSON, of protocol buffers, of TFDS
        raise prepare.damaged(root, error) from error


def _stored(source: Source) -> tfds.core.DatasetBuilder:
    """A data set that was prepared before: a directory, or a name under a data directory."""
    directory = _find(source)
    if directory is None:
        where = source.data_dir or '~/tensorflow_datasets'
        raise UserError(f'no data set {source.name!r} in {where}: {_how_to_prepare(source)}')
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # of JSON, of protocol buffers, of TFDS
        raise _damaged(source, str(directory), error) from error
    stored = builder.info.file_format.value if builder.info.file_format else 'no known format'
    if stored != _FORMAT:
        raise UserError(
            f'{source.name!r} is stored as {stored} in {directory}, which needs TensorFlow: '
            f'{_how_to_prepare(source)}'
        )
    return builder


def _how_to_prepare(source: Source) -> str:
    where = f', data_dir={source.data_dir!r}' if source.data_dir else ''
    name = source.name if not epath.Path(source.name).exists() else 'NAME'
    return (
        'prepare it with `python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()\"`"
    )


def _find(source: Source) -> epath.Path | None:
    """The directory with dataset_info.json: the newest version where none is named. Raises
    UserError for a bucket that cannot be read, since a package is missing."""
    try:
        return _found(source)
    except ImportError as error:
        raise UserError(
            f'{source.name!r} in {source.data_dir or source.name}: {error}; or mount the bucket '
            'and give its path'
        ) from error


def _found(source: Source) -> epath.Path | None:
    name, _, version = source.name.partition(':')
    root = epath.Path(source.data_dir or '~/tensorflow_datasets').expanduser()
    candidates = [epath.Path(source.name).expanduser()] if version == '' else []
    for base in (*candidates, root / name):
        if (base / 'dataset_info.json').exists():
            return base
        if not base.exists():
            continue
        versions = [p for p in base.iterdir() if (p / 'dataset_info.json').exists()]
        versions = [p for p in versions if version in ('', p.name)]
        if versions:
            return max(versions, key=lambda p: [int(n) for n in p.name.split('.') if n.isdigit()])
    return None


def _documents(
    builder: tfds.core.DatasetBuilder, source: Source, split: str, reads: type[Record]
) -> Documents:
    known = builder.info.splits
    bases = list(known) if split == 'all' else _bases(split)
    total = sum(known[name].num_examples for name in known)
    if not has(builder, split) or count(builder, source, split) == 0:
        raise UserError(
            f'{source.name!r} has no documents in the split {split!r} ({total} in '
            f'{", ".join(known)}): {", or ".join(_remedies(split, total))}'
        )
    features = builder.info.features
    own = builder.name in FILES
    # The text builder stores every field of a .jsonl as 'text', and every record.
    field = 'text' if own else source.field
    if (builder.name == RECORDS) != (reads is not Text) and own:
        stored = 'records' if builder.name == RECORDS else 'texts'
        raise UserError(
            f'{source.name!r} holds {stored}, and the objective reads {schemas.NAMES[reads]}: give '
            'the files that it was prepared from (--data.files)'
        )
    if reads is Text and not _is_text(features, field):
        raise UserError(
            f'{source.name!r} has no text field {field!r} '
            f'(there: {", ".join(sorted(features))}): set field'
        )
    info = builder.info
    identity = (
        info.full_name,
        split,
        known[split].num_examples,
        [(known[base].num_bytes, known[base].shard_lengths) for base in bases],
        *([] if field == 'text' else [field]),
        *([] if reads is Text else [RECORDS, source.rename]),
    )
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()
    damaged = functools.partial(_damaged, source, str(builder.data_path))
    share = known[split].num_examples / sum(known[base].num_examples for base in bases)
    size = round(share * sum(known[base].num_bytes or 0 for base in bases))
    try:
        records = builder.as_data_source(split)
    except Exception as error:  # of array_record
        raise damaged(error) from error
    made = Documents(source.name, records, field, digest, size, damaged, source)
    if reads is Text:
        return made
    return RecordDocuments(
        **vars(made), features=None if own else features, rename=_renames(source)
    )


def _is_text(features: Any, field: str) -> bool:
    return field in features and features[field].np_dtype in (np.object_, object, str, bytes)


def has(builder: tfds.core.DatasetBuilder, split: str) -> bool:
    """Whether a data set has all splits of which this one is cut."""
    return set(_bases(split)) - {'all'} <= set(builder.info.splits)


def overlap(builder: tfds.core.DatasetBuilder, one: str, other: str) -> bool:
    """Whether two splits, which are there, have a document in common."""

    def parts(split: str) -> Iterator[tuple[str, range]]:
        known = builder.info.splits
        for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(known):
            end = known[part.splitname].num_examples if part.to is None else part.to
            yield part.splitname, range(part.from_ or 0, end)

    return any(
        first == second and max(a.start, b.start) < min(a.stop, b.stop)
        for first, a in parts(one)
        for second, b in parts(other)
    )


def _bases(split: str) -> list[str]:
    return [part.strip().partition('[')[0] for part in split.split('+')]


def count(builder: tfds.core.DatasetBuilder, source: Source, split: str) -> int:
    """Documents of a split. Raises UserError for a slice that is none."""
    try:
        return builder.info.splits[split].num_examples
    except (ValueError, NotImplementedError) as error:  # of several lines; 'all' has no slices
        problem = str(error).splitlines()[0].partition(' See ')[0].rstrip('.')
        raise UserError(
            f"{source.name!r} has no split {split!r} ({problem}): write it as 'train[:99%]'"
        ) from error


def _remedies(split: str, documents: int) -> Iterator[str]:
    """What to do where a split of a data set has no documents."""
    yield 'give more text'
    if documents >= 10:
        yield "set --data.train-split 'train[:90%]' --data.validation-split 'train[90%:]'"
    if split == 'validation':
        yield 'train without validation (--evaluation.every 0)'


def _damaged(source: Source, directory: str, problem: object) -> UserError:
    if source.name.partition('/')[0] in (*MADE_HERE, *FILES) and not source.data_dir:
        return prepare.damaged(Path(directory), problem)
    return UserError(f'{source.name!r} in {directory} is damaged ({problem}): prepare it again')

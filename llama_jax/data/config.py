"""Settings of the data pipeline."""

import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llama_jax.paths import local
from llama_jax.text.tokenizer import TokenizerConfig

FILES = ('text_files', 'records')
"""Sources that are files of one's own."""
MADE_HERE = ('python_corpus', 'synthetic')
"""Those that this package makes."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One component of a mixture of data sets. Overridden as `--data.sources.0.weight 2`, or all at
    once as `--data.mix 'web/*.jsonl=3' python_corpus/stdlib_code=1` or `--data.files 'books/*'`."""

    name: str
    """`python_corpus/stdlib_code`, `synthetic/star_graph`, `text_files`, any tensorflow-datasets
    name such as `wikipedia/20231101.en`, or a directory with a prepared builder. For an objective
    that reads more than texts (chats, pairs, labels), `text_files` are `records`: files of JSON or
    Parquet."""
    weight: float = 1.0
    """Share in the mixture, relative to the other weights; `DataConfig.share` says of what."""
    label: str = ''
    """What figures of this source are called. Default: its name, or that of its first file or of
    the directory with them."""
    split: str | None = None
    """Instead of the split of the configuration, e.g. 'all', 'test', 'train[:50%]'."""
    data_dir: str | None = None
    """Where the data set is (or gets) prepared, local or gs://; None: a cache directory."""
    files: tuple[str, ...] = ()
    """For `text_files`: files, directories (all text in them and below) and globs. Text, .jsonl,
    .ndjson, .json, .parquet; compressed as .gz, .zst, .xz or .bz2."""
    exclude: tuple[str, ...] = ()
    """Globs for names among `files` that are left out, such as `*.min.js` or `drafts/*`."""
    field: str = 'text'
    """Which field of a record (of a JSON object, or column of Parquet) is the document."""
    rename: tuple[str, ...] = ()
    """NAME=FIELD of records: what the objective calls NAME is in FIELD, such as `target=docstring`,
    `text=review`. data/schemas.py has the names."""
    encoding: str = 'utf-8'
    """Of `files`: gb18030, latin-1, utf-16 or any other that Python knows."""
    document_characters: int | None = None
    """Where longer texts of `files` are cut into several documents. None: 524,288; less where a
    few files of plain text would leave too few documents to hold some out."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where documents come from and how they are tokenised and read ahead."""

    sources: tuple[Source, ...] = (Source('python_corpus/stdlib_code'),)
    share: Literal['tokens', 'documents'] = 'tokens'
    """What the weights of sources are shares of."""
    validation: tuple[Source, ...] = ()
    """Named sets to validate on, in place of the held-out splits of `sources`, or all at once as
    `--data.validate 'zh=sanguo/*.txt' code=python_corpus/stdlib_code`. A set that names no split is
    read as a whole where it is files, else its `validation_split`."""
    train_split: str = 'train'
    """Slices work too, such as `train[:99%]`."""
    validation_split: str = 'validation'
    test_split: str = 'test'
    """What a suite is measured on; one that is trained on is refused. Sets that `validation` names
    are measured in its place, and a source whose own `split` is given, or that has no split 'test',
    where the run validates: choices have seen those."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    chat: str | None = None
    """How chats are written: a file with a Jinja template, or chatml, llama2, llama3, llama4. None:
    as the model does that the run begins with."""
    too_long: Literal['refuse', 'drop', 'truncate'] = 'refuse'
    """What becomes of records that need more positions than a row has. They are counted and named
    before the first step."""
    bad_records: Literal['refuse', 'drop'] = 'refuse'
    """What becomes of records that the objective cannot learn from (a chat without an answer, equal
    answers, no label). They are counted and named before the first step."""
    workers: int = 0
    """Processes that tokenise and pack; 0: a background thread."""
    prefetch: int = 8
    """Batches made ahead of the training step (per worker where there are workers)."""

    def of(self, split: str) -> tuple[Source, ...]:
        """The sources that are read in 'train' or 'validation', each with its split."""
        usual = {'train': self.train_split, 'validation': self.validation_split}[split]
        if split == 'train' or not self.validation:
            return tuple(_of_split(source, usual) for source in self.sources)
        # Files that are named for validation alone are held out as a whole.
        return tuple(
            _of_split(source, 'all' if source.name in FILES else usual)
            for source in self.validation
        )


def _of_split(source: Source, split: str) -> Source:
    return dataclasses.replace(source, split=source.split or split)


def labels(sources: Sequence[Source]) -> list[str]:
    """A label for each source, of which no two are alike."""
    found: list[str] = []
    for source in sources:
        label = source.label or _name_of(source.files) or source.name.replace('/', '_')
        label = re.sub(r'[^\w.-]+', '_', label).strip('_') or 'source'
        numbered = itertools.chain([label], (f'{label}-{n}' for n in itertools.count(2)))
        found.append(next(name for name in numbered if name not in found))
    return found


def _name_of(files: Sequence[str]) -> str:
    """Of the first: its name, or for one such as books/**/*.txt the nearest directory's."""
    parts = reversed(Path(files[0]).parts if files else ())
    return next(filter(None, (part.strip('*?/').partition('.')[0] for part in parts)), '')


def cache_dir() -> Path:
    """Where prepared corpora and tokenizers are kept: $LLAMA_JAX_CACHE or ~/.cache/llama_jax."""
    return local(os.environ.get('LLAMA_JAX_CACHE') or '~/.cache/llama_jax', 'LLAMA_JAX_CACHE')

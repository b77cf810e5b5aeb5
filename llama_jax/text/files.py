"""How a model of another code base reads and writes text: its tokenizer and its chat format."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert import gguf_header
from llama_jax.errors import UserError
from llama_jax.paths import local
from llama_jax.text import directory as directories
from llama_jax.text import gguf_vocabulary, template_files
from llama_jax.text.chat import ChatFormat, by_vocabulary
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    vocabulary: Vocabulary
    begin: tuple[int, ...]
    """Ids before every prompt that is no chat: bos, where the model was trained with it."""
    chat: ChatFormat | None
    """None for a model that does not say how it is asked."""


def from_gguf(settings: Mapping[str, Any], *, vocab: int = 0) -> Text:
    """Of the settings of a GGUF file, for a model with `vocab` rows of embedding (0: as many as
    there are tokens). Raises UserError for a kind of vocabulary not supported."""
    vocabulary = gguf_vocabulary.read(settings, rows=vocab)
    begin = vocabulary.bos_id if gguf_vocabulary.begins_with_bos(settings) else None
    begins = () if begin is None else (begin,)
    return Text(vocabulary, begins, template_files.of_gguf(settings))


def from_huggingface(directory: Path, *, vocab: int) -> Text:
    """Of the files in the directory of a model with `vocab` rows of embedding; see `directory`."""
    vocabulary = directories.read(directory, rows=vocab)
    if not vocabulary.end_ids:
        raise UserError(f'{directory}: neither config.json nor tokenizer_config.json names eos')
    settings = directories.look_beside(directory).settings
    chat: ChatFormat | None = template_files.of_directory(directory, settings)
    if chat is None and not (directory / 'config.json').is_file():  # Meta's
        chat = by_vocabulary(vocabulary)
    return Text(vocabulary, _begin(vocabulary, settings), chat)


def tokenizer_of(path: str | Path) -> Tokenizer:
    """The tokenizer for training that a file or a directory holds, control tokens included: a
    SentencePiece .model, a tokenizer.json, tiktoken ranks, a .gguf file, the directory of a model
    or of a run. Ids of its own stay, and no control token of ours takes one, nor a row of its
    model's embedding. Raises UserError when it is none."""
    path = local(path, 'the tokenizer')
    around = path if path.is_dir() else path.parent
    stamps = [_stamp(path), *(_stamp(around / name) for name in directories.ALL_NAMES)]
    return _tokenizer_of(path, tuple(stamps))


def _stamp(path: Path) -> tuple[int, int] | None:
    """By which a file is known to be the same."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)  # a script asks several times, and a large one takes seconds
def _tokenizer_of(path: Path, stamps: tuple[tuple[int, int] | None, ...]) -> Tokenizer:
    if path.is_dir():
        rows = directories.look_beside(path).rows
        return directories.read(path, rows=rows).extended(rows)
    if gguf_header.is_gguf(path):
        settings = _gguf_settings(path)
        rows = settings.get('llama.vocab_size', 0)
        return gguf_vocabulary.read(settings, rows=rows).extended(rows)
    if path.name in directories.NAMES:
        rows = directories.look_beside(path.parent).rows
        return directories.read(path.parent, file=path, rows=rows).extended(rows)
    return directories.alone(path).extended()


def _begin(vocabulary: directories.Vocabulary, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids before a text: what tokenizer.json puts there, bos where the settings say so."""
    with_bos = settings.get('add_bos_token')
    if isinstance(vocabulary, JsonTokenizer):
        begin, behind = vocabulary.around()
        if behind:
            log.warning('prompts end without %s, which this tokenizer puts behind texts', behind)
        if with_bos is None or bool(begin) == with_bos:
            return begin
        return () if not with_bos or vocabulary.bos_id is None else (vocabulary.bos_id,)
    return () if with_bos is False or vocabulary.bos_id is None else (vocabulary.bos_id,)


def _gguf_settings(path: Path) -> dict[str, Any]:
    try:
        return gguf_header.parse(np.asarray(np.memmap(path, mode='r')).data)[0]
    except (OSError, ValueError) as error:
        raise UserError(f'{path} is no whole GGUF file ({error}): copy it again') from None

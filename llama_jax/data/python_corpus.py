"""tensorflow-datasets builder `python_corpus`: the Python installation as a text corpus."""

import itertools
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from llama_jax.data import deduplicate, python_files, splits
from llama_jax.errors import UserError


class PythonCorpus(tfds.core.GeneratorBasedBuilder):
    """Source code and docstrings of the standard library and of the installed packages.

    Configs: `stdlib_code`, `stdlib_docs` (docstrings and the topics of `help()`), `installed_code`,
    `installed_docs`. Features, all UTF-8 text: `text` (the document), `module` (dotted name),
    `package` (its first part, a label), `docstring` and `body` (a function's pair, else empty).

    Splits: train 90%, validation 5%, test 5%, by a hash of the module, so that the docstrings of a
    module stay together. Near-duplicates are dropped, training documents being kept first: a
    held-out document repeats less than half of what training saw. Records are in the order of
    their modules.
    """

    # TFDS finds this itself, but only where the package importlib_resources is installed.
    code_path = epath.Path(__file__)
    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(
            name=f'{where}_{what}', description=f'{what} of the {where} modules'
        )
        for where, what in itertools.product(('stdlib', 'installed'), ('code', 'docs'))
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        names = ('text', 'module', 'package', 'docstring', 'body')
        return tfds.core.DatasetInfo(
            builder=self,
            description='The text that every Python installation carries.',
            features=tfds.features.FeaturesDict({n: tfds.features.Text() for n in names}),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: Any
    ) -> dict[str, Iterator[tuple[int, python_files.Record]]]:
        del dl_manager  # nothing to download
        where, what = self.builder_config.name.split('_')
        by_split: dict[str, list[python_files.Record]] = {name: [] for name in splits.NAMES}
        read = dict(code=python_files.code_records, docs=python_files.docstring_records)[what]
        for module, path in python_files.python_files(where):
            by_split[splits.by_hash(module)].extend(read(module, path))
        if (where, what) == ('stdlib', 'docs'):
            for record in python_files.topic_records():
                by_split[splits.by_hash(record['module'])].append(record)
        order = [record for name in splits.NAMES for record in by_split[name]]
        repeated = iter(deduplicate.near_duplicates(record['text'] for record in order))
        kept = {n: [r for r in by_split[n] if not next(repeated)] for n in splits.NAMES}
        if not any(kept.values()):
            raise UserError(
                f'no {where} modules with {what}: install packages or use stdlib_{what}'
            )
        # TFDS refuses splits without documents.
        return {name: self._generate_examples(records) for name, records in kept.items() if records}

    def _generate_examples(
        self, records: list[python_files.Record]
    ) -> Iterator[tuple[int, python_files.Record]]:
        yield from enumerate(records)


def fingerprint(config: str) -> str:
    """Hash of what the builder would read for this config."""
    return python_files.fingerprint(python_files.python_files(config.split('_')[0]))

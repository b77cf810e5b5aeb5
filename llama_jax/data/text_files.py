"""tensorflow-datasets builder `text_files`: local text of any kind as a corpus."""

import dataclasses
import glob
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from llama_jax.data import splits
from llama_jax.errors import UserError

_DOCUMENT_CHARACTERS = 16_384


@dataclasses.dataclass(eq=False)
class TextFilesConfig(tfds.core.BuilderConfig):
    """Globs and, for .jsonl, the field that holds the text."""

    files: tuple[str, ...] = ()
    field: str = 'text'


class TextFiles(tfds.core.GeneratorBasedBuilder):
    """Documents from files: `text`, and `origin` (file and place in it).

    `.jsonl` and `.jsonl.gz` give one document per line. Any other file must be UTF-8 text; one of
    more than 16,384 characters is cut into documents at blank lines, else at line ends. Splits go
    by a hash of the document, so equal documents stay together: train 90%, validation 5%, test 5%.
    Where a few documents leave a held-out split empty, it gets one from train.
    """

    # TFDS finds this itself, but only where the package importlib_resources is installed.
    code_path = epath.Path(__file__)
    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description='Documents from local text files.',
            features=tfds.features.FeaturesDict(
                {'text': tfds.features.Text(), 'origin': tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        del dl_manager  # nothing to download
        config = self.builder_config
        # Two passes: the first keeps positions only, so the text need not fit in memory.
        positions = [splits.position(text) for text, _ in documents(config.files, config.field)]
        assigned = _assign(positions)
        # TFDS refuses splits without documents.
        names = [name for name in splits.NAMES if name in assigned]
        return {name: self._generate_examples(name, assigned) for name in names}

    def _generate_examples(
        self, split: str, assigned: list[str]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        config = self.builder_config
        for i, (text, origin) in enumerate(documents(config.files, config.field)):
            if assigned[i] == split:
                yield i, {'text': text, 'origin': origin}


def _assign(positions: list[float]) -> list[str]:
    """The split of each document from the hashes of all."""
    assigned = [splits.by_position(position) for position in positions]
    for name in ('validation', 'test'):
        different = {p for p, split in zip(positions, assigned, strict=True) if split == 'train'}
        if name not in assigned and len(different) > 1:
            chosen = min(different)
            assigned = [
                name if position == chosen else split
                for position, split in zip(positions, assigned, strict=True)
            ]
    return assigned


def fingerprint(files: tuple[str, ...], field: str) -> str:
    """Hash of the names, contents and field. Raises UserError for globs that match nothing."""
    digest = hashlib.blake2b(field.encode(), digest_size=16)
    for path in matching(files):
        with path.open('rb') as file:
            content = hashlib.file_digest(file, 'blake2b').hexdigest()
        digest.update(f'{path.name}\0{content}\n'.encode())
    return digest.hexdigest()


def matching(files: tuple[str, ...]) -> list[Path]:
    """The files that the globs name, sorted. Raises UserError for a glob without a match."""
    if not files:
        raise UserError(
            'text_files without files: name some, e.g. --data.sources.0.files notes/*.txt'
        )
    found = set()
    for pattern in files:
        matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        matches = [name for name in matches if Path(name).is_file()]
        if not matches:
            raise UserError(f'no file matches {pattern!r}: check the path (** looks in folders)')
        found.update(matches)
    return [Path(name) for name in sorted(found)]


def documents(files: tuple[str, ...], field: str) -> Iterator[tuple[str, str]]:
    """(text, origin) of every document. Raises UserError naming the file that holds no text."""
    for path in matching(files):
        empty = True
        is_lines = path.name.endswith(('.jsonl', '.jsonl.gz'))
        for text, place in _json_lines(path, field) if is_lines else _pieces(path):
            if text.strip():
                empty = False
                yield text, f'{path.name}:{place}'
        if empty:
            raise UserError(f'{str(path)!r} holds no text: remove it from the files')


def _json_lines(path: Path, field: str) -> Iterator[tuple[str, int]]:
    try:
        with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_text(line, field, f'{str(path)!r}, line {number}'), number
    except (OSError, EOFError) as error:
        raise UserError(f'cannot read {str(path)!r} ({error}): give a whole file') from error


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f'{where} is no JSON ({error}): one object a line is wanted') from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        there = ', '.join(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(f'{where} has no text in the field {field!r} (there: {there}): set field')
    # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
    return re.sub('[\ud800-\udfff]', '\ufffd', value[field])


def _pieces(path: Path) -> Iterator[tuple[str, int]]:
    """(text, number) of the documents that a file is cut into; joined they are the file."""
    data = path.read_bytes()
    try:
        if b'\0' in data:
            raise UserError(
                f'{str(path)!r} is binary (a zero byte at {data.index(0)}): give text files'
            )
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(
            f'{str(path)!r} is no UTF-8 text (byte {error.start}): if it is text, convert it with '
            '`iconv -f ENCODING -t UTF-8`'
        ) from None
    yield from ((piece, number) for number, piece in enumerate(cut(text), start=1))


def cut(text: str, most: int = _DOCUMENT_CHARACTERS) -> list[str]:
    """Pieces of at most `most` characters, cut after a blank line, else a line, else anywhere."""
    pieces = []
    while len(text) > most:
        window = text[:most]
        end = window.rfind('\n\n') + 2
        if end < most // 2:
            end = window.rfind('\n') + 1
        if end < most // 2:
            end = most
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text] if text else pieces

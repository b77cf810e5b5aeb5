"""Tensors that lie in files: where each is, and reading one at a time.

By plain reads and not by a map of the file: pages of a map that were touched count as memory of the
process. What is damaged is told in one line that names the file and the remedy.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llama_jax.convert.tensors import Tensors
from llama_jax.errors import UserError

FLOATS = {
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
}
"""Types of weights by the names that safetensors and GGUF share."""
_LONGEST_JSON = 256 << 20
_PARTIAL = ('.incomplete', '.part', '.partial', '.aria2', '.crdownload', '.download', '.tmp')
"""Endings that downloaders give to a file which is not whole yet."""
_HUB_PARTIAL = '.cache/huggingface/download/*.incomplete'
"""Where huggingface_hub keeps such a file, by a name of its own."""


@dataclass(frozen=True)
class Place:
    """Where the numbers of a tensor are."""

    path: Path
    kind: str
    """Its type as the file calls it."""
    dtype: np.dtype | None
    """None for a type that weights are not read from, such as int8."""
    shape: tuple[int, ...]
    start: int
    """Byte of the file."""
    strides: tuple[int, ...] | None = None
    """In entries; None where they lie row after row."""

    def __post_init__(self) -> None:
        if self.strides == _row_after_row(self.shape):
            object.__setattr__(self, 'strides', None)

    @property
    def entries(self) -> int:
        """From the first to the last, those between included."""
        if self.strides is None or 0 in self.shape:
            return math.prod(self.shape)
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


class Stored(Tensors):
    """The tensors of files."""

    def __init__(self, places: Mapping[str, Place]):
        self.places = places

    def __getitem__(self, name: str) -> np.ndarray:
        return read(self.places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self.places[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Of a tensor, without reading it."""
        dtype = self.places[name].dtype
        assert dtype is not None, 'whoever makes the places refuses other types'
        return dtype


def read(place: Place) -> np.ndarray:
    """The numbers of a tensor. Raises UserError when the file ends before them."""
    assert place.dtype is not None
    data = np.empty(place.entries * place.dtype.itemsize, np.uint8)
    with opened(place.path) as file:
        file.seek(place.start)
        unread = memoryview(data.data)
        while unread:  # a read gives no more than 2 GB
            n = file.readinto(unread)  # type: ignore[attr-defined]  # of a raw file
            if not n:
                raise damaged(place.path, 'it has become shorter')
            unread = unread[n:]
    numbers = data.view(place.dtype)
    if place.strides is None:
        return numbers.reshape(place.shape)
    strides = [stride * place.dtype.itemsize for stride in place.strides]
    view = np.lib.stride_tricks.as_strided(numbers, place.shape, strides, writeable=False)
    return np.ascontiguousarray(view)


def in_one(files: Iterable[tuple[Path, Mapping[str, Place]]]) -> dict[str, Place]:
    """The tensors of several files. Raises UserError when two of them hold the same one."""
    places: dict[str, Place] = {}
    for path, found in files:
        for name, place in found.items():
            if name in places:
                raise UserError(
                    f'tensor {name!r} is in {places[name].path} and in {path}: remove the file '
                    'that is not of this model'
                )
            places[name] = place
    return places


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, to read without a buffer. Raises UserError when there is none, or no right to."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = 'a directory' if stat.S_ISDIR(mode) else 'no plain file'
            raise UserError(f'{path} is {what}: put the file of that name there')
        file = open(path, 'rb', buffering=0)  # noqa: SIM115  closed below
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f'{path} is a link to nothing: fetch the file again') from None
        raise UserError(f'{path} is missing{unfinished(path)}: fetch it') from None
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    with file:
        try:
            yield file
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror}') from None


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds, by name. Raises UserError for one that does not hold that."""
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size > _LONGEST_JSON:
            raise damaged(path, 'it is too long for JSON')
        data = file.read()
    return object_of(path, data)


def object_of(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object of `data`, which is of the file `path`."""
    try:
        content = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f'it is no JSON: {_line(error)}') from None
    if not isinstance(content, dict):
        raise damaged(path, f'it holds {_a_kind(content)} and not settings by name')
    return content


def damaged(path: Path, why: str) -> UserError:
    """For the user, by how the file begins where that says more than `why`."""
    try:
        with open(path, 'rb') as file:
            head = file.read(256)
    except OSError as error:
        return UserError(f'{path} cannot be read: {error.strerror}')
    again = f'fetch it again{unfinished(path)}'
    if not head:
        return UserError(f'{path} is empty: {again}')
    if head.startswith(b'version https://git-lfs'):
        return UserError(
            f'{path} is a pointer of git-lfs and not the file itself: run git lfs pull in its '
            'directory, or fetch the file again'
        )
    text = head.lstrip(b'\xef\xbb\xbf \r\n\t')
    if text.startswith(b'<'):
        return UserError(f'{path} is a web page: {again}')
    if head.isascii() and not _is_json(path) and all(c >= 32 or c in b'\r\n\t' for c in head):
        begin = head.decode('ascii').split('\n')[0][:60]
        return UserError(f'{path} is a text that begins {begin!r}: {again}')
    return UserError(f'{path} is damaged, {why}: {again}')


def missing_files(directory: Path, names: Iterable[str], said_by: str) -> UserError:
    """For the user, who has not all files that `said_by` names."""
    names = sorted(names)
    few = ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')
    note = next((note for name in names if (note := unfinished(directory / name))), '')
    return UserError(
        f'{directory}: {few} missing ({len(names)} of the files that {said_by} names)'
        f'{note}: fetch what is missing, or remove {said_by} if it is of another model'
    )


def unfinished(path: Path) -> str:
    """What says that the file is on its way: a note in brackets, empty where nothing does."""
    for ending in _PARTIAL:
        if os.path.lexists(f'{path}{ending}'):
            return f' ({path.name}{ending} beside it says that a download has not ended)'
    found = next(path.parent.glob(_HUB_PARTIAL), None)
    return '' if found is None else f' ({found} says that a download has not ended)'


def _is_json(path: Path) -> bool:
    return path.suffix == '.json'


def _row_after_row(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    for name, value in pairs:
        if value != content[name]:
            raise ValueError(f'{name!r} is there twice')
    return content


def _a_kind(content: Any) -> str:
    return {list: 'a list', str: 'a text', type(None): 'null'}.get(type(content), 'one value')


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())[:120]

"""Where the tensors of a file of torch.save are, read without PyTorch.

Such a file is a zip archive (since PyTorch 1.6): data.pkl, which describes the tensors, and an
uncompressed file data/KEY for each storage that they are views of. To unpickle runs whatever a file
names. Here it may name what makes tensors and nothing else, and these names stand for functions of
this file that note where a tensor is.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.convert.stored import Place, damaged, opened
from llama_jax.errors import UserError

_DTYPES = {
    'DoubleStorage': np.dtype(np.float64),
    'FloatStorage': np.dtype(np.float32),
    'HalfStorage': np.dtype(np.float16),
    'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
}
_TYPES = re.compile(r'\w+Storage|b?float\d+\w*|u?int\d+|complex\d+|bool')
"""Names of storages and of types in the module torch."""
_LONGEST_PICKLE = 100_000_000
_OLD_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF'
_LOCAL_HEADER = struct.Struct('<4s22xHH')
"""Of a file in a zip archive: magic, then the lengths of its name and of what stands behind it."""
_WRAPPERS = ('state_dict', 'model', 'module', 'model_state_dict')
"""What training libraries call the weights in a file that holds more."""


class _Storage(NamedTuple):
    kind: str
    key: str
    entries: int


class _View(NamedTuple):
    """A tensor, as the file describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    bits: Any = None
    """What else is done to the numbers, such as {'neg': True}; nothing to most."""


def places(path: Path) -> dict[str, Place]:
    """The tensors of a file by name; their numbers are not read.

    Raises UserError when the file is none, holds other than tensors by name, or is damaged.
    """
    with opened(path) as file:
        head = file.read(8)
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        if head.startswith(_OLD_MAGIC):
            raise UserError(
                f'{path} is of PyTorch before 1.6: write it anew where PyTorch is installed, '
                'torch.save(torch.load(FILE), FILE)'
            )
        if not head.startswith(b'PK'):
            raise damaged(path, 'it is no file of torch.save')
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            raise damaged(path, f'it ends too early, after {size} bytes') from None
        with archive:
            members = _members(path, archive)
            content = _unpickled(path, _bytes(path, archive, members['data.pkl']))
            views = _views(path, content)
            storages = {view.storage for view in views.values()}
            starts = {key: _start(path, file, members, key, size) for key in storages}
    return {name: _place(path, name, view, starts[view.storage]) for name, view in views.items()}


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Files of the archive by their names below its one directory."""
    members = {info.filename.partition('/')[2]: info for info in archive.infolist()}
    if 'constants.pkl' in members:
        raise UserError(f'{path} is a TorchScript program: give the state dict of the model')
    if 'data.pkl' not in members:
        raise damaged(path, 'it is a zip archive without data.pkl, and torch.save writes that')
    if len(members) < len(archive.infolist()):
        raise damaged(path, 'it holds two files of one name')
    if 'byteorder' in members and _bytes(path, archive, members['byteorder']) != b'little':
        raise UserError(f'{path} was written on a big-endian machine: write it anew on another')
    return members


def _bytes(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > _LONGEST_PICKLE or info.compress_type != zipfile.ZIP_STORED:
        raise damaged(path, f'{info.filename} is too long or compressed')
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError):
        raise damaged(path, f'{info.filename} cannot be read') from None


def _unpickled(path: Path, data: bytes) -> Any:
    try:
        return _Unpickler(path, data).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises any of a dozen kinds
        raise damaged(path, f'its data.pkl cannot be read ({type(error).__name__})') from None


class _Unpickler(pickle.Unpickler):
    """Makes tensors, texts, numbers, lists and dictionaries. Any other name is an error."""

    def __init__(self, path: Path, data: bytes):
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for."""
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if module in ('torch', 'torch.storage') and _TYPES.fullmatch(name):
            return name  # a text: nothing to call
        raise UserError(
            f'{self._path} names {module}.{name}, and only tensors are read from a file of '
            'torch.save, for it could run any program: save the state dict as safetensors'
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, by what the file says of it."""
        what, kind, key, _, entries = pid
        if what != 'storage' or not (type(kind) is type(key) is str) or type(entries) is not int:
            raise ValueError
        return _Storage(kind, key, entries)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _: Any = 0, __: Any = 0, bits: Any = None
) -> _View:
    """torch._utils._rebuild_tensor_v2; two arguments concern gradients."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError
    return _View(storage, offset, tuple(shape), tuple(strides), bits)


def _tensor_of_type(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _View:
    """torch._utils._rebuild_tensor_v3, for types that have no storage of their own (float8)."""
    view, dtype = _tensor(storage, offset, shape, strides), rest[2]
    if not isinstance(dtype, str):
        raise ValueError
    return view._replace(storage=storage._replace(kind=dtype))


def _parameter(data: Any, *_: Any) -> _View:
    """torch._utils._rebuild_parameter."""
    if not isinstance(data, _View):
        raise ValueError
    return data


class _Made:
    """A function that a file may call. Without attributes, which a file could change."""

    __slots__ = ('_make',)

    def __init__(self, make: Callable[..., _View]):
        self._make = make

    def __call__(self, *arguments: Any) -> _View:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError


_NAMES: Mapping[tuple[str, str], Any] = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('torch._utils', '_rebuild_tensor_v2'): _Made(_tensor),
    ('torch._utils', '_rebuild_tensor_v3'): _Made(_tensor_of_type),
    ('torch._utils', '_rebuild_parameter'): _Made(_parameter),
}


def _views(path: Path, content: Any) -> dict[str, _View]:
    if not isinstance(content, dict):
        raise UserError(f'{path} holds no tensors by name: give the state dict of the model')
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, _View):
            continue
        if name in _WRAPPERS and isinstance(value, dict):
            raise UserError(
                f'{path} holds a training state with the weights under {name!r}: save them alone, '
                f'torch.save(torch.load(FILE)[{name!r}], FILE)'
            )
        raise UserError(f'{path}: {name!r} is no tensor: give the state dict of the model')
    return content


def _start(
    path: Path,
    file: Any,
    members: Mapping[str, zipfile.ZipInfo],
    storage: _Storage,
    size: int,
) -> int:
    """The byte where the numbers of a storage begin. Its local header says how long that is."""
    info = members.get(f'data/{storage.key}')
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise damaged(path, f'data/{storage.key} is missing or compressed')
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b'PK\3\4'):
        raise damaged(path, f'data/{storage.key} is not where the archive says')
    _, name, extra = _LOCAL_HEADER.unpack(header)
    start = info.header_offset + _LOCAL_HEADER.size + name + extra
    dtype = _DTYPES.get(storage.kind)
    if dtype and info.file_size < storage.entries * dtype.itemsize or start + info.file_size > size:
        raise damaged(path, f'data/{storage.key} is too short')
    return start


def _place(path: Path, name: str, view: _View, start: int) -> Place:
    storage = view.storage
    dtype = _DTYPES.get(storage.kind)
    if view.bits:
        raise UserError(
            f'{path}: tensor {name!r} is a view that changes signs ({view.bits}): save '
            'tensor.resolve_neg() instead'
        )
    itemsize = dtype.itemsize if dtype else 1
    begin = start + view.offset * itemsize
    place = Place(path, storage.kind, dtype, view.shape, begin, view.strides)
    if dtype and view.offset + place.entries > storage.entries:
        raise damaged(path, f'tensor {name!r} is longer than what it is a view of')
    return place

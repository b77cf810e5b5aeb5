"""Writes files as torch.save does, whole or with what no model holds, without PyTorch."""

import io
import pickle
import struct
import zipfile

import numpy as np


class Name:
    """Pickled as the name of something in a module."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Storage(Name):
    def __init__(self, kind, key, entries):
        super().__init__('torch', kind)
        self.key, self.entries = key, entries


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Pickler(pickle._Pickler):
    """Writes what torch.save writes, without PyTorch."""

    def persistent_id(self, value):
        if isinstance(value, Storage):
            kind = Name(value.module, value.name)
            return 'storage', kind, value.key, 'cuda:0', value.entries
        return None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Name) and not isinstance(value, Storage):
            self.write(f'c{value.module}\n{value.name}\n'.encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


REBUILD = Name('torch._utils', '_rebuild_tensor_v2')
KINDS = {'float32': 'FloatStorage', 'float16': 'HalfStorage', 'bfloat16': 'BFloat16Storage'}


def view(storage, offset, shape, strides, function=REBUILD):
    return Call(function, storage, offset, shape, strides, False, {})


def torch_file(path, content, storages=(), **files):
    """A file of torch.save: `content` is what it holds, with calls and names of this test."""
    written = io.BytesIO()
    Pickler(written, protocol=2).dump(content)
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in ({'data.pkl': written.getvalue()} | files).items():
            archive.writestr(f'archive/{name}', data)
        for key, data in dict(storages).items():
            info = zipfile.ZipInfo(f'archive/data/{key}')
            # Numbers begin at a multiple of 64 bytes: padding behind the name, in the header that
            # stands before them and not in its copy at the end.
            padding = -(archive.start_dir + 30 + len(info.filename) + 4) % 64
            info.extra = b'FB' + struct.pack('<H', padding) + b'Z' * padding
            archive.writestr(info, data)
            info.extra = b''


def saved(path, tensors):
    content, storages = {}, {}
    for i, (name, value) in enumerate(tensors.items()):
        storage = Storage(KINDS[value.dtype.name], str(i), value.size)
        strides = tuple(np.array(value.strides) // value.itemsize)
        content[name] = view(storage, 0, value.shape, tuple(map(int, strides)))
        storages[str(i)] = value.tobytes()
    torch_file(path, content, storages)

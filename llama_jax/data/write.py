"""Writing data sets that tensorflow-datasets reads: array_record shards and their description.

TFDS's own writer shuffles through TensorFlow above 1,000 MiB and writes in one process.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python import array_record_module

# Records are read one at a time. Level 1 of Zstandard writes twice as fast as level 3 and the files
# are a tenth larger.
_OPTIONS = 'group_size:1,zstd:1'
_SIZES = 'sizes.json'


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def example(features: Mapping[str, bytes]) -> bytes:
    """A serialised tf.train.Example of bytes features, as TFDS stores tfds.features.Text."""
    entries = [
        _field(1, _field(1, name.encode()) + _field(2, _field(1, _field(1, value))))
        for name, value in sorted(features.items())
    ]
    return _field(1, b''.join(entries))


class ShardWriter:
    """One array_record file. Counts its records and their bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.records, self.bytes = path, 0, 0
        with _full_disks_are_os_errors(path):
            self._writer = array_record_module.ArrayRecordWriter(os.fspath(path), _OPTIONS)

    def write(self, record: bytes) -> None:
        """Appends a record. Raises OSError for a full disk, here or in `close`."""
        with _full_disks_are_os_errors(self.path):
            self._writer.write(record)
        self.records += 1
        self.bytes += len(record)

    def close(self) -> None:
        """Completes the file."""
        with _full_disks_are_os_errors(self.path):
            self._writer.close()


@contextlib.contextmanager
def _full_disks_are_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # what array_record raises, with a text only
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), os.fspath(path)) from error
        raise


class Shard(NamedTuple):
    """A file of one split."""

    file: str
    records: int
    bytes: int


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """The name that TFDS expects of a shard."""
    return f'{name}-{split}.array_record-{number:05d}-of-{count:05d}'


def write_description(
    directory: Path,
    *,
    name: str,
    config: str,
    version: str,
    description: str,
    texts: Sequence[str],
    splits: Mapping[str, Sequence[Shard]],
) -> None:
    """Writes the metadata of shards that lie in `directory` under the names that TFDS expects.

    `tfds.builder_from_directory` opens it then. `texts` are the features, all of them text.
    """
    import tensorflow_datasets as tfds

    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=name,
            config_name=config,
            version=tfds.core.Version(version),
            data_dir=os.fspath(directory),
            module_name='',
        ),
        description=description,
        features=tfds.features.FeaturesDict({text: tfds.features.Text() for text in texts}),
    )
    info.set_file_format('array_record')
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.records for shard in shards],
            num_bytes=sum(shard.bytes for shard in shards),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=directory, dataset_name=name, split=split, filetype_suffix='array_record'
            ),
        )
        for split, shards in splits.items()
    ]
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(directory)
    sizes = {
        path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()
    }
    (directory / _SIZES).write_text(json.dumps(sizes))


def damage(directory: Path) -> str | None:
    """What is missing or cut off in a directory that `write_description` completed, else None."""
    try:
        sizes: dict[str, Any] = json.loads((directory / _SIZES).read_text())
    except (OSError, ValueError) as error:
        return f'{_SIZES}: {getattr(error, "strerror", None) or error}'
    for name, size in sizes.items():
        try:
            there = (directory / name).stat().st_size
        except OSError as error:
            return f'{name}: {error.strerror}'
        if there != size:
            return f'{name} has {there:,} bytes instead of {size:,}'
    return None

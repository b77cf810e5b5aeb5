"""The header of a GGUF file: what is read, and what cannot be, is refused at once."""

import struct

import pytest

from llama_jax.convert import gguf, gguf_header
from llama_jax.errors import UserError
from tests.convert.test_gguf import CONFIG, written


def test_the_header_is_what_the_package_reads(tmp_path):
    from gguf import GGUFReader

    settings = {
        'tokenizer.ggml.tokens': ['a', '\u4e2d', '\U0001f600'],
        'a.float': 0.1,
        'a.flag': True,
    }
    settings |= {'tokenizer.ggml.scores': [0.5, -1.0], 'a.number': 7, 'a.text': '\u4e2d\u6587'}
    path, _ = written(tmp_path, CONFIG, settings=settings)
    theirs = GGUFReader(path)
    ours, infos = gguf_header.parse(memoryview(path.read_bytes()))
    expected = {name: field.contents() for name, field in theirs.fields.items()}
    assert ours == {name: x for name, x in expected.items() if not name.startswith('GGUF.')}
    for info, tensor in zip(infos, theirs.tensors, strict=True):
        place = (info.name, info.kind, info.start)
        assert place == (tensor.name, tensor.tensor_type, tensor.data_offset)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))


def test_numbers_of_every_type(tmp_path):
    """Alone and in an array; each would be another number in a type beside its own."""
    from gguf import GGUFValueType as Type
    from gguf import GGUFWriter

    values = {
        **{Type.UINT8: 200, Type.INT8: -100, Type.UINT16: 60_000, Type.INT16: -30_000},
        **{Type.UINT32: 2**32 - 2, Type.INT32: -(2**31), Type.FLOAT32: 0.5, Type.BOOL: True},
        **{Type.UINT64: 2**64 - 2, Type.INT64: -(2**63), Type.FLOAT64: 0.1},
    }
    writer = GGUFWriter(tmp_path / 'a.gguf', 'llama')
    for kind, value in values.items():
        writer.add_key_value(f'one.{kind.name}', value, kind)
        writer.add_key_value(f'two.{kind.name}', [value, 0], Type.ARRAY, sub_type=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found, _ = gguf_header.parse(memoryview((tmp_path / 'a.gguf').read_bytes()))
    for kind, value in values.items():
        assert found[f'one.{kind.name}'] == value
        assert found[f'two.{kind.name}'] == [value, 0]
    assert found['one.BOOL'] is True


def test_a_file_is_known_by_its_name_or_by_how_it_begins(tmp_path):
    path, _ = written(tmp_path, CONFIG)
    path.rename(tmp_path / 'sha256-0a')
    for name in ('a.gguf', 'B.GGUF'):  # which is then said to be damaged
        (tmp_path / name).write_text('version https://git-lfs.github.com/spec/v1')
    (tmp_path / 'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1')
    for name, known in {
        **{'sha256-0a': True, 'a.gguf': True, 'B.GGUF': True, 'nowhere.gguf': True},
        **{'model.safetensors': False, '.': False, 'nowhere': False},
    }.items():
        assert gguf_header.is_gguf(tmp_path / name) == known, name


def test_no_beginning_of_a_file_is_taken_for_a_whole_one(tmp_path):
    path, _ = written(tmp_path, CONFIG)
    content = memoryview(path.read_bytes())
    n_header = gguf_header.parse(content)[1][0].start
    for n in range(n_header - 32):
        with pytest.raises(ValueError, match='ends too early|begin with GGUF'):
            gguf_header.parse(content[:n])


def header(*settings, tensors=()):
    """A file's beginning, from settings and tensors as bytes."""
    counts = struct.pack('<IQQ', 3, len(tensors), len(settings))
    return memoryview(b'GGUF' + counts + b''.join(settings) + b''.join(tensors))


def text(value):
    return struct.pack('<Q', len(value)) + value


def array(inner, n):
    return text(b'a') + struct.pack('<IIQ', 9, inner, n)


def tensor(name, *, dims=(32, 32), offset=0):
    shape = struct.pack(f'<I{len(dims)}Q', len(dims), *dims)
    return text(name) + shape + struct.pack('<IQ', 0, offset)


@pytest.mark.parametrize(
    ('content', 'named'),
    [
        (header(array(5, 2**62)), 'ends too early'),
        (header(array(0, 2**63)), 'ends too early'),
        (header(array(8, 2**62)), 'ends too early'),
        (header(array(9, 1), b'0' * 99), 'an array of type 9'),
        (header(text(b'a') + struct.pack('<I', 99), b'0' * 99), 'a value of type 99'),
        (header(*[text(b'a') + struct.pack('<II', 4, 1)] * 2), "two settings 'a'"),
        (header(tensors=[tensor(b't'), tensor(b't')]), "'t' is there twice"),
        (header(tensors=[tensor(b't', dims=(1,) * 5)]), '5 dimensions'),
        (header(tensors=[tensor(b't', offset=33)]), "'t' is at 33"),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_headers_that_say_what_cannot_be(content, named):
    with pytest.raises(ValueError, match=named):
        gguf_header.parse(content)


@pytest.mark.parametrize(
    ('at', 'change', 'named'),
    [
        (4, (1).to_bytes(4, 'little'), 'version 1'),
        (4, (3).to_bytes(4, 'big'), 'big-endian'),
        (8, (2**62).to_bytes(8, 'little'), 'is damaged, it ends too early'),
        (16, (2**62).to_bytes(8, 'little'), 'is damaged, it ends too early'),
        (24, (2**62).to_bytes(8, 'little'), 'ends too early'),
    ],
    ids=str,
)
def test_damaged_headers_are_refused_at_once(tmp_path, at, change, named):
    path, _ = written(tmp_path, CONFIG)
    content = bytearray(path.read_bytes())
    content[at : at + len(change)] = change
    path.write_bytes(content)
    with pytest.raises(UserError, match=named):
        gguf.load(path)

"""Files of torch.save, read without PyTorch: nothing in them is run."""

import json
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_jax.convert import directory
from tests.convert.test_directory import LFS, ZEROS, A, B, refused, same
from tests.convert.torch_format import REBUILD, Call, Name, Storage, saved, torch_file, view


def test_files_of_torch_save(tmp_path):
    saved(tmp_path / 'one.bin', A)
    saved(tmp_path / 'two.bin', B)
    homes = {'a': 'one.bin', 'b': 'two.bin', 'c': 'two.bin'}
    index = tmp_path / 'pytorch_model.bin.index.json'
    index.write_text(json.dumps({'weight_map': homes}))
    saved(tmp_path / 'training_args.bin', ZEROS)
    same(directory.weights(tmp_path), A | B)
    index.unlink()
    saved(tmp_path / 'pytorch_model.bin', B)
    same(directory.weights(tmp_path), B)
    save_file(A, tmp_path / 'model.safetensors')  # the same model twice: safetensors first
    same(directory.weights(tmp_path), A)


def test_views_of_one_storage(tmp_path):
    numbers = np.arange(20, dtype=np.float32)
    storage = Storage('FloatStorage', '0', 20)
    parameter = Call(Name('torch._utils', '_rebuild_parameter'), view(storage, 0, (2,), (1,)), True)
    content = {
        'rows': view(storage, 4, (2, 3), (3, 1)),
        'columns': view(storage, 4, (3, 2), (1, 5)),
        'again': view(storage, 19, (3,), (0,)),
        'none': view(storage, 20, (0, 3), (3, 1)),
        'one': view(storage, 7, (), ()),
        'parameter': parameter,
    }
    torch_file(tmp_path / 'pytorch_model.bin', content, {'0': numbers.tobytes()})
    expected = {
        'rows': numbers[4:10].reshape(2, 3),
        'columns': np.array([[4, 9], [5, 10], [6, 11]], np.float32),
        'again': np.full(3, 19, np.float32),
        'none': np.zeros((0, 3), np.float32),
        'one': np.array(7, np.float32),
        'parameter': numbers[:2],
    }
    found = directory.weights(tmp_path)
    same(found, expected)
    assert all(found[name].flags.c_contiguous for name in found)


OF_TYPE = Call(
    Name('torch._utils', '_rebuild_tensor_v3'),
    Storage('UntypedStorage', '0', 8),
    *(0, (8,), (1,), False, {}, Name('torch', 'float8_e4m3fn')),
)
GOOD = view(Storage('FloatStorage', '0', 2), 0, (2,), (1,))


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (Call(Name('os', 'system'), 'touch hacked'), 'names os.system, and only tensors'),
        ({'a': Call(Name('builtins', 'eval'), '1')}, 'names builtins.eval'),
        ({'a': Call(Name('torch._utils', '_rebuild_qtensor'), 1)}, '_rebuild_qtensor'),
        ({'a': Name('torch.storage', '_load_from_bytes')}, '_load_from_bytes'),
        ([GOOD], 'no tensors by name'),
        ({'a': 3}, "'a' is no tensor"),
        ({3: GOOD}, '3 is no tensor'),
        ({'state_dict': {'a': GOOD}}, "under 'state_dict'"),
        ({'layers': {'a': GOOD}}, "'layers' is no tensor"),
        ({'a': OF_TYPE}, "'a' is of type float8_e4m3fn"),
        ({'a': Call(REBUILD, 'text', 0, (2,), (1,))}, 'damaged'),
        ({'a': view(Storage('FloatStorage', '0', 2), 1, (2,), (1,))}, "'a' is longer"),
        ({'a': view(Storage('FloatStorage', '0', 2), -1, (2,), (1,))}, 'damaged'),
        ({'a': view(Storage('FloatStorage', '0', 2), 0, (2,), (1, 1))}, 'damaged'),
        ({'a': view(Storage('FloatStorage', '0', 3), 0, (2,), (1,))}, 'data/0 is too short'),
        ({'a': view(Storage('FloatStorage', '1', 2), 0, (2,), (1,))}, 'data/1 is missing'),
        ({'a': view(Storage('CharStorage', '0', 8), 0, (8,), (1,))}, 'of type CharStorage'),
        ({'a': Call(REBUILD, *GOOD.arguments, {'neg': True})}, "changes signs ({'neg': True}"),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_files_of_torch_save_that_hold_something_else(tmp_path, content, words):
    torch_file(tmp_path / 'pytorch_model.bin', content, {'0': bytes(8)})
    assert words in refused(tmp_path)


def test_a_file_cannot_change_what_reads_it(tmp_path):
    """The opcode BUILD sets attributes: of the names that a file may use, none has any."""
    for name in ('_rebuild_tensor_v2', '_rebuild_parameter'):
        data = f'\x80\x02ctorch._utils\n{name}\n}}X\x01\0\0\0aK\x01sb.'.encode()
        torch_file(tmp_path / 'pytorch_model.bin', {}, **{'data.pkl': data})
        assert 'damaged, its data.pkl cannot be read' in refused(tmp_path)


@pytest.mark.parametrize(
    ('files', 'words'),
    [
        ({'constants.pkl': b''}, 'TorchScript'),
        ({'byteorder': b'big'}, 'big-endian'),
        ({'data.pkl': b'\x80\x02}q'}, 'data.pkl cannot be read'),
    ],
)
def test_archives_that_are_something_else(tmp_path, files, words):
    torch_file(tmp_path / 'pytorch_model.bin', {'a': GOOD}, {'0': bytes(8)}, **files)
    assert words in refused(tmp_path)


@pytest.mark.parametrize('where', ['elsewhere', 'at its end'])
def test_an_archive_that_says_another_place_for_numbers(tmp_path, where):
    path = tmp_path / 'pytorch_model.bin'
    torch_file(path, {'a': GOOD}, {'0': bytes(8)})
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b'PK\1\2')  # of the last member, data/0
    # Within the numbers; or where no whole header follows, though it begins as one.
    place = {'elsewhere': 8, 'at its end': len(whole) - 4}[where]
    whole[entry + 42 : entry + 46] = place.to_bytes(4, 'little')
    if where == 'at its end':
        at = whole.index(b'PK\5\6')
        whole[at + 20 : at + 22] = (4).to_bytes(2, 'little')  # the comment of the archive
        whole += b'PK\3\4'
        whole[entry + 42 : entry + 46] = (len(whole) - 4).to_bytes(4, 'little')
    path.write_bytes(bytes(whole))
    said = refused(tmp_path)
    # Python 3.13 sees by itself that two members of the archive overlap.
    assert 'data/0 is not where the archive says' in said or 'data.pkl cannot be read' in said


def test_other_files_by_the_name_of_one_of_torch_save(tmp_path):
    path = tmp_path / 'pytorch_model.bin'
    path.write_bytes(b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.')
    assert 'PyTorch before 1.6' in refused(tmp_path)
    path.write_bytes(LFS)
    assert 'git-lfs' in refused(tmp_path)
    path.write_bytes(b'\0\1')
    assert 'no file of torch.save' in refused(tmp_path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/b', b'')
    assert 'without data.pkl' in refused(tmp_path)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a/data.pkl', b'\x80\x02}.')
    assert 'too long or compressed' in refused(tmp_path)

"""Which files of a directory are the model, and what is said of those that are damaged."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_jax.convert import directory
from llama_jax.errors import UserError
from tests.convert.torch_format import saved

A = {'a': np.arange(6, dtype=np.float32).reshape(2, 3)}
B = {'b': np.arange(4, dtype=np.float16), 'c': np.ones((2, 2), ml_dtypes.bfloat16)}
ZEROS = {name: np.zeros_like(value) for name, value in A.items()}


def shards(where, files, index='model.safetensors.index.json', **homes):
    for name, tensors in files.items():
        save_file(tensors, where / name)
        homes = {tensor: name for tensor in tensors} | homes
    (where / index).write_text(json.dumps({'metadata': {}, 'weight_map': homes}))


def refused(where):
    with pytest.raises(UserError) as error:
        directory.weights(where)
    assert '\n' not in str(error.value) and str(where) in str(error.value)
    return str(error.value)


def same(found, expected):
    assert set(found) == set(expected) and len(found) == len(expected)
    for name, value in expected.items():
        assert found.shape(name) == value.shape and found.dtype(name) == value.dtype
        assert name in found and found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_the_index_says_which_files_are_the_model(tmp_path):
    shards(tmp_path, {'one.safetensors': A, 'two.safetensors': B})
    for stray in ('old', 'zz-backup', 'consolidated', 'model.ema'):
        save_file(ZEROS, tmp_path / f'{stray}.safetensors')
    same(directory.weights(tmp_path), A | B)


@pytest.mark.parametrize(
    ('index', 'alone'),
    [
        ('model.safetensors.index.json', 'model.safetensors'),
        ('pytorch_model.bin.index.json', 'pytorch_model.bin'),
    ],
)
def test_the_index_counts_before_the_usual_file_which_is_told_of(tmp_path, caplog, index, alone):
    shards(tmp_path, {'one.safetensors': A, 'two.safetensors': B}, index)
    same(directory.weights(tmp_path), A | B)
    assert not caplog.text
    (tmp_path / alone).write_bytes(b'')
    same(directory.weights(tmp_path), A | B)
    assert f'{index} names one.safetensors and others, which are read; {alone} is' in caplog.text
    assert f'remove {alone}, or {index} if it is the older one' in caplog.text


def test_an_adapter_beside_the_model_is_told_of(tmp_path, caplog):
    (tmp_path / 'adapter_config.json').write_text('{}')
    assert 'no model: name the model before it' in refused(tmp_path) and not caplog.text
    (tmp_path / 'adapter_config.json').unlink()
    save_file(A, tmp_path / 'model.safetensors')
    same(directory.weights(tmp_path), A)
    assert not caplog.text
    save_file(ZEROS, tmp_path / 'adapter_model.safetensors')
    same(directory.weights(tmp_path), A)
    assert f'{tmp_path} holds an adapter (PEFT) beside the model: it is not applied' in caplog.text
    (tmp_path / 'model.safetensors').unlink()
    caplog.clear()
    assert 'holds an adapter (PEFT) and no model' in refused(tmp_path)
    assert not caplog.text


def test_without_an_index_the_usual_name_counts_else_the_only_file(tmp_path):
    save_file(ZEROS, tmp_path / 'model.ema.safetensors')
    assert 'no model.safetensors, and model.ema.safetensors is none by its' in refused(tmp_path)
    for stray in ('adapter_model', 'consolidated', 'optimizer', 'training_state', 'random_states'):
        save_file(ZEROS, tmp_path / f'{stray}.safetensors')
    (tmp_path / 'model.safetensors.bak').write_bytes(b'')
    assert 'which' not in refused(tmp_path)
    save_file(A, tmp_path / 'model.fp16.safetensors')
    same(directory.weights(tmp_path), A)
    save_file(ZEROS, tmp_path / 'model.bf16.safetensors')
    assert 'which of model.bf16.safetensors, model.fp16.safetensors' in refused(tmp_path)
    save_file(A | B, tmp_path / 'model.safetensors')
    same(directory.weights(tmp_path), A | B)


def test_a_tensor_has_one_home(tmp_path):
    shards(tmp_path, {'one.safetensors': A, 'two.safetensors': B | ZEROS})
    line = refused(tmp_path)
    assert "'a' is in" in line and 'one.safetensors' in line and 'two.safetensors' in line


@pytest.mark.parametrize(
    ('homes', 'words'),
    [
        ({'x': 'three.safetensors'}, 'three.safetensors missing (1 of the files'),
        ({'x': 'one.safetensors'}, "'x' is not in one.safetensors"),
        ({'a': 'two.safetensors'}, "'a' is not in two.safetensors"),
        ({'x': '../one.safetensors'}, "the file of 'x' is '../one.safetensors'"),
        ({'x': 7}, "the file of 'x' is 7"),
        ({'x': 'one.onnx'}, 'one.onnx is of no kind'),
    ],
)
def test_an_index_that_does_not_fit_its_files(tmp_path, homes, words):
    shards(tmp_path, {'one.safetensors': A, 'two.safetensors': B}, **homes)
    assert words in refused(tmp_path)


def test_all_shards_that_are_missing_are_told(tmp_path):
    names = [f'model-0000{i}-of-00006.safetensors' for i in range(1, 7)]
    shards(tmp_path, {names[0]: A}, **dict(zip('bcdef', names[1:], strict=True)))
    (tmp_path / (names[2] + '.incomplete')).write_bytes(b'')
    line = refused(tmp_path)
    assert ', '.join(names[1:5]) + ', ... missing (5 of' in line
    assert f'({names[2]}.incomplete beside it says that a download has not ended)' in line
    for content in ('{}', '{"weight_map": {}}', '{"weight_map": []}'):
        (tmp_path / 'model.safetensors.index.json').write_text(content)
        assert 'weight_map' in refused(tmp_path)


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        (
            'adapter_config.json',
            'an adapter of some/base (PEFT) and no model: name the model before it',
        ),
        ('model.gguf', 'name that file: '),
        ('snapshots/5f1c/config.json', 'snapshots/5f1c'),
        ('checkpoint-40/config.json', 'checkpoint-40'),
        ('tf_model.h5', 'TensorFlow'),
        ('pytorch_model-00001-of-00002.bin', 'fetch pytorch_model.bin.index.json'),
        ('run.json', 'a run of this project: give --checkpoint'),
        ('lit_model.pth', 'LitGPT'),
        ('zero_to_fp32.py', 'DeepSpeed'),
        ('README.md', 'has no model.safetensors: fetch it'),
        ('model.safetensors.part', '(model.safetensors.part beside it says that a download'),
        ('.cache/huggingface/download/x.incomplete', 'download/x.incomplete says that'),
        ('params.json', 'fetch consolidated.00.pth as well'),
        ('consolidated.00.pth', 'fetch params.json as well'),
    ],
)
def test_a_directory_without_a_model(tmp_path, name, words):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{"base_model_name_or_path": "some/base"}')
    assert words in refused(tmp_path)


@pytest.mark.parametrize(
    ('name', 'dtype', 'words'),
    [
        ('model.layers.0.mlp.up_proj.qweight', np.float32, 'GPTQ or AWQ'),
        ('model.layers.0.mlp.up_proj.weight_scale_inv', np.float32, 'fp8'),
        ('model.layers.0.mlp.up_proj.SCB', np.float32, 'bitsandbytes'),
        ('model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4', 'B', 'bitsandbytes'),
        ('model.layers.0.mlp.up_proj.weight', np.int8, 'of type I8'),
        ('model.layers.0.mlp.up_proj.weight', ml_dtypes.float8_e4m3fn, 'of type F8_E4M3'),
    ],
)
def test_quantised_tensors_are_refused_by_name(tmp_path, name, dtype, words):
    save_file({name: np.zeros((2, 2), dtype)}, tmp_path / 'model.safetensors')
    line = refused(tmp_path)
    assert repr(name) in line and words in line and 'not quantised' in line


LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', 'is empty'),
        (LFS, 'a pointer of git-lfs'),
        (b'<!DOCTYPE html><html>', 'is a web page'),
        (b'Entry not found', "a text that begins 'Entry not found'"),
        (b'{"error": "Repository not found"}', 'a text that begins \'{"error"'),
        (b'\xff' * 64, 'does not begin as safetensors do'),
        (b'\x40' + bytes(7) + b'{"a"', 'ends within its header'),
        (b'\2' + bytes(7) + b'[]', 'does not begin as safetensors do'),
        (b'\4' + bytes(7) + b'{"a"', 'no JSON'),
        (b'\x09' + bytes(7) + b'{"a": {}}', "where 'a' is"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, words):
    (tmp_path / 'model.safetensors').write_bytes(content)
    line = refused(tmp_path)
    assert words in line and 'model.safetensors' in line and 'fetch' in line


def header(**changes):
    entry = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]} | changes
    return json.dumps({'__metadata__': {}, 'a': entry}).encode()


@pytest.mark.parametrize(
    ('text', 'n_bytes', 'words'),
    [
        (header(shape=[3]), 8, "where 'a' is"),
        (header(shape=[-2]), 8, "where 'a' is"),
        (header(data_offsets=[8, 0]), 8, "where 'a' is"),
        (header(dtype=None), 8, 'type None'),
        (header(), 7, 'bytes and its header describes'),
        (header(), 9, 'bytes and its header describes'),
        (header()[:-1] + b', "b": ' + header()[25:], 8, 'at the same place'),
        (header()[:-1] + b', "a": {}}', 8, "'a' is there twice"),
        (b'{' + b'"a":[' * 9000, 0, 'no JSON'),
    ],
)
def test_headers_that_do_not_describe_the_file(tmp_path, text, n_bytes, words):
    data = len(text).to_bytes(8, 'little') + text + bytes(n_bytes)
    (tmp_path / 'model.safetensors').write_bytes(data)
    assert words in refused(tmp_path)


def test_places_that_are_no_files(tmp_path):
    path = tmp_path / 'model.safetensors'
    path.mkdir()
    assert 'is a directory' in refused(tmp_path)
    path.rmdir()
    path.symlink_to('../blobs/gone')
    assert 'a link to nothing' in refused(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert 'no plain file' in refused(tmp_path)
    path.unlink()
    path.symlink_to(path.name)
    assert 'cannot be read: Too many levels' in refused(tmp_path)
    unreadable = '/proc/self/mem'
    if os.path.exists(unreadable):
        path.unlink()
        path.symlink_to(unreadable)
        assert 'cannot be read: Input/output error' in refused(tmp_path)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    save_file(A, tmp_path / 'model.safetensors')
    found = directory.weights(tmp_path)
    with open(tmp_path / 'model.safetensors', 'rb+') as file:
        file.truncate((tmp_path / 'model.safetensors').stat().st_size - 1)
    with pytest.raises(UserError, match='model.safetensors is damaged, it has become shorter'):
        found['a']


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_a_file_that_is_cut_or_garbled_anywhere(tmp_path, name):
    """Never another exception, and never other numbers where the file is shorter."""
    path = tmp_path / name
    (save_file if name.endswith('safetensors') else lambda t, p: saved(p, t))(A | B, path)
    whole = path.read_bytes()
    for n in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:n])
        assert name in refused(tmp_path)
    random = np.random.default_rng(0)
    for at in range(0, len(whole), 5):
        junk = random.bytes(int(random.integers(1, 9)))
        path.write_bytes(whole[:at] + junk + whole[at + len(junk) :])
        try:
            found = directory.weights(tmp_path)
            for tensor in found:
                found[tensor]
        except UserError as error:
            assert name in str(error) and '\n' not in str(error)

"""Files that PyTorch and transformers write: every kind gives the numbers that were saved."""

import json

import numpy as np
import pytest

from llama_jax.convert import directory, huggingface, huggingface_config, meta_files
from llama_jax.convert.meta import params_from_meta, params_to_meta
from llama_jax.errors import UserError
from tests.parity.cases import CASES, weights

pytestmark = pytest.mark.parity

CONFIG = CASES['llama2']


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found.shape(name) == tuple(value.shape)
        assert found.dtype(name).name == str(value.dtype).removeprefix('torch.')
        got = found[name]
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got.astype(np.float32), value.detach().float().numpy())


def state_dict():
    """Mixed types, a parameter, a transposed view and two names of one storage, as models have."""
    import torch

    tensors = {name: torch.tensor(value) for name, value in weights(CONFIG, seed=2).items()}
    for name, value in tensors.items():
        if 'mlp' in name:
            tensors[name] = value.half()
        elif 'norm' not in name:
            tensors[name] = value.bfloat16()
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    name = 'model.layers.0.mlp.up_proj.weight'
    tensors[name] = tensors[name].t().contiguous().t()
    tensors['model.norm.weight'] = torch.nn.Parameter(tensors['model.norm.weight'])
    return tensors


def test_state_dicts_of_torch_save(tmp_path):
    import torch

    tensors = state_dict()
    torch.save(tensors, tmp_path / 'pytorch_model.bin')
    same(directory.weights(tmp_path), tensors)
    settings = huggingface_config.config_to_huggingface(CONFIG)
    (tmp_path / 'config.json').write_text(json.dumps(settings))
    config, found = huggingface.read(tmp_path)
    assert config == CONFIG
    same(found, tensors)

    names = sorted(tensors)
    shards = {'a.bin': names[:9], 'b.bin': names[9:]}
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, tmp_path / file)
    homes = {name: file for file, part in shards.items() for name in part}
    (tmp_path / 'pytorch_model.bin').unlink()
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': homes}))
    same(directory.weights(tmp_path), tensors)


def test_what_torch_save_writes_besides(tmp_path):
    import torch

    path = tmp_path / 'pytorch_model.bin'
    one = torch.ones(2, 3)
    for content, words in (
        ({'a': one.to(torch.int8)}, 'CharStorage'),
        ({'a': one.to(torch.float8_e4m3fn)}, 'float8_e4m3fn'),
        ({'a': one.to(torch.complex64)}, 'ComplexFloatStorage'),
        ({'a': one.to_sparse()}, '_rebuild_sparse_tensor'),
        ({'model': {'a': one}, 'optimizer': {}}, "under 'model'"),
        (torch.nn.Linear(2, 2), 'torch.nn.modules.linear.Linear'),
        ({'a': tmp_path}, 'pathlib'),
        ({'a': np.ones(2)}, 'numpy'),
        ({'a': one, 'step': 3}, "'step' is no tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=words):
            directory.weights(tmp_path)
    torch.save({'a': one}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match='PyTorch before 1.6'):
        directory.weights(tmp_path)


@pytest.mark.parametrize(('parts', 'axis'), [(1, 0), (2, 1)])
def test_parts_as_meta_writes_them(tmp_path, parts, axis):
    """Its tensors are views of one storage, the embedding is split over columns (Llama 2)."""
    import torch

    params = huggingface.params_from_huggingface(weights(CONFIG, seed=2), CONFIG)
    tensors = params_to_meta(params, CONFIG)
    axes = {'wo': 1, 'w2': 1, 'tok_embeddings': axis}
    for i in range(parts):
        split = {
            name: w if w.ndim == 1 else np.split(w, parts, axes.get(name.split('.')[-2], 0))[i]
            for name, w in tensors.items()
        }
        storage, views, at = torch.zeros(sum(w.size for w in split.values())), {}, 0
        for name, w in split.items():
            views[name] = storage[at : at + w.size].view(w.shape)
            views[name][...] = torch.tensor(w)
            at += w.size
        torch.save(views, tmp_path / f'consolidated.{i:02}.pth')
    settings = {'dim': CONFIG.dim, 'n_layers': CONFIG.layers, 'n_heads': CONFIG.heads}
    settings |= {'n_kv_heads': CONFIG.kv_heads, 'head_dim': CONFIG.head_dim, 'vocab_size': -1}
    settings |= {'norm_eps': CONFIG.norm_eps, 'hidden_dim': CONFIG.ffn, 'max_seq_len': 4096}
    (tmp_path / 'params.json').write_text(json.dumps(settings))
    config, found = meta_files.read(tmp_path)
    assert config == CONFIG
    back = huggingface.params_to_huggingface(params_from_meta(found, config), config)
    for name, value in weights(CONFIG, seed=2).items():
        np.testing.assert_array_equal(back[name], value)

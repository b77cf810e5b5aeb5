"""Directories as Meta releases them: parts joined, and what params.json leaves unsaid."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_jax.convert import huggingface, meta, meta_files
from llama_jax.errors import UserError
from llama_jax.model.config import RopeScaling
from llama_jax.model.patterns import Dense, Window
from tests.convert.torch_format import saved
from tests.parity.cases import CASES, weights

CONFIG = replace(CASES['llama2'], layers=2, vocab=32, ffn=176)
PARAMS = {'dim': 64, 'n_layers': 2, 'n_heads': 8, 'n_kv_heads': 2, 'multiple_of': 176}
PARAMS |= {'norm_eps': 1e-5, 'vocab_size': -1, 'max_seq_len': 4096}
CONFIG = replace(CONFIG, head_dim=8)


def tensors_of(config, seed=7):
    params = huggingface.params_from_huggingface(weights(config, seed=seed), config)
    return params, meta.params_to_meta(params, config)


def write(where, tensors, *, params=PARAMS, parts=1, embedding=0):
    """Parts as fairscale's layers divide matrices; `embedding` is the axis of that one."""
    axes = {'wo': 1, 'w2': 1, 'tok_embeddings': embedding}
    (where / 'params.json').write_text(json.dumps(params))
    for i in range(parts):
        part = {
            name: w
            if w.ndim == 1
            else np.ascontiguousarray(np.split(w, parts, axes.get(name.split('.')[-2], 0))[i])
            for name, w in tensors.items()
        }
        saved(where / f'consolidated.{i:02}.pth', part)


def refused(where):
    with pytest.raises(UserError) as error:
        meta_files.read(where)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(('parts', 'embedding'), [(1, 0), (2, 0), (2, 1), (4, 1)])
def test_parts_make_the_whole(tmp_path, parts, embedding):
    params, tensors = tensors_of(CONFIG)
    write(tmp_path, tensors, parts=parts, embedding=embedding)
    assert meta_files.is_meta(tmp_path)
    config, found = meta_files.read(tmp_path)
    assert config == CONFIG
    assert {name: found.shape(name) for name in found} == {k: v.shape for k, v in tensors.items()}
    assert len(found) == len(tensors) and 'norm.weight' in found
    back = meta.params_from_meta(found, config)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_parts_keep_the_type_of_the_file(tmp_path):
    _, tensors = tensors_of(CONFIG)
    half = {name: w.astype(ml_dtypes.bfloat16) for name, w in tensors.items()}
    write(tmp_path, half, parts=2)
    _, found = meta_files.read(tmp_path)
    for name, w in half.items():
        assert found.dtype(name) == found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name], w)


def test_one_file_of_safetensors_in_the_layout_of_mistral(tmp_path):
    config = replace(CONFIG, ffn=200, head_dim=16, heads=4, pattern=Window(64))
    _, tensors = tensors_of(replace(config, pattern=Dense()))
    params = {'dim': 64, 'n_layers': 2, 'head_dim': 16, 'hidden_dim': 200, 'n_heads': 4}
    params |= {'n_kv_heads': 2, 'norm_eps': 1e-5, 'vocab_size': 32, 'sliding_window': 64}
    (tmp_path / 'params.json').write_text(json.dumps(params | {'max_seq_len': 4096}))
    assert not meta_files.is_meta(tmp_path)
    save_file(tensors, tmp_path / 'consolidated.safetensors')
    assert meta_files.is_meta(tmp_path)
    assert meta_files.read(tmp_path)[0] == config
    (tmp_path / 'config.json').write_text('{}')
    assert meta_files.is_meta(tmp_path)
    (tmp_path / 'model.safetensors').write_text('')
    assert not meta_files.is_meta(tmp_path)  # of two layouts the one that says more
    names, homes = sorted(tensors), {}
    for file, part in (('consolidated-1.safetensors', names[:5]), ('2.safetensors', names[5:])):
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        homes |= dict.fromkeys(part, file)
    index = tmp_path / 'consolidated.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': homes}))
    (tmp_path / 'consolidated.safetensors').unlink()
    (tmp_path / 'model.safetensors').unlink()
    assert meta_files.is_meta(tmp_path) and len(meta_files.read(tmp_path)[1]) == len(tensors)
    index.unlink()
    save_file(weights(CONFIG, seed=1), tmp_path / 'consolidated.safetensors')
    assert "no tensor 'tok_embeddings.weight'" in refused(tmp_path)


def test_a_head_that_is_the_embedding(tmp_path):
    config = replace(CASES['llama3_2'], layers=1, vocab=96, rope_scaling=None, context=100, ffn=192)
    params = {'dim': 72, 'n_layers': 1, 'n_heads': 6, 'n_kv_heads': 2, 'multiple_of': 64}
    params |= {'norm_eps': 1e-5, 'max_seq_len': 100, 'rope_theta': 5e5, 'head_dim': 16}
    expected, tensors = tensors_of(config)
    alone = {name: w for name, w in tensors.items() if name != 'output.weight'}
    for stored, said in ((tensors, {}), (alone, {'tied_embeddings': True})):  # Meta, Mistral
        write(tmp_path, stored, params=params | said)
        found, read = meta_files.read(tmp_path)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, meta.params_from_meta(read, found), expected)
    write(tmp_path, alone, params=params)
    found, read = meta_files.read(tmp_path)
    with pytest.raises(UserError, match='missing: .* say "tied_embeddings": true in params.json'):
        meta.params_from_meta(read, found)
    tensors['output.weight'] = tensors['output.weight'].copy()
    tensors['output.weight'][63] += 1
    write(tmp_path, tensors, params=params)
    assert not meta_files.read(tmp_path)[0].tied


def test_parts_that_do_not_belong_together(tmp_path):
    _, tensors = tensors_of(CONFIG)
    write(tmp_path, tensors, parts=4)
    (tmp_path / 'consolidated.02.pth').rename(tmp_path / 'other.pth')
    assert 'consolidated.02.pth missing (1 of' in refused(tmp_path)
    (tmp_path / 'consolidated.03.pth').unlink()
    two = 'has 2 files of weights, and by params.json there are 4'
    assert two in refused(tmp_path)
    (tmp_path / 'params.json').write_text(json.dumps(PARAMS | {'vocab_size': CONFIG.vocab}))
    assert two in refused(tmp_path)  # and not that the vocabulary is another
    saved(tmp_path / 'consolidated.01.pth', {k: v for k, v in tensors.items() if 'wq' not in k})
    assert 'consolidated.01.pth: layers.0.attention.wq.weight is not as in' in refused(tmp_path)
    saved(tmp_path / 'consolidated.01.pth', tensors)
    assert 'consolidated.01.pth: a tensor is not as in' in refused(tmp_path)


SCALED = {'rope_theta': 5e5, 'use_scaled_rope': True}
SHAPES = [
    ('LLaMA 1 7B', {'norm_eps': 1e-6}, 32000, 2048, None),
    ('LLaMA 1 65B', {'dim': 8192, 'n_layers': 80}, 32000, 2048, None),
    ('Llama 2 7B', {}, 32000, 4096, None),
    ('Llama 2 70B', {'dim': 8192, 'n_layers': 80, 'n_kv_heads': 8}, 32000, 4096, None),
    ('Code Llama 7B', {'rope_theta': 1e6}, 32016, 16384, None),
    ('Code Llama 34B', {'rope_theta': 1e6, 'dim': 8192, 'n_layers': 48}, 32000, 16384, None),
    ('Code Llama 70B Instruct', {'dim': 8192, 'n_layers': 80, 'n_kv_heads': 8}, 32016, 4096, None),
    ('Llama 3 8B', {'rope_theta': 5e5}, 128256, 8192, None),
    ('Llama 3.1 8B', SCALED, 128256, 131072, 8.0),
    ('Llama 3.1 405B', SCALED | {'dim': 16384, 'n_layers': 126}, 128256, 131072, 8.0),
    ('Llama 3.2 1B', SCALED | {'dim': 2048, 'n_layers': 16}, 128256, 131072, 32.0),
    (
        'Guard 3 1B',
        SCALED | {'dim': 2048, 'n_layers': 12, 'hidden_dim': 6400},
        128256,
        131072,
        32.0,
    ),
    ('Llama 3.2 3B', SCALED | {'dim': 3072, 'n_layers': 28}, 128256, 131072, 32.0),
    ('Mistral 7B', {'hidden_dim': 14336, 'rope_theta': 1e6}, 32768, 32768, None),
    ('said', {'max_seq_len': 77}, 77, 77, None),
    (
        'said over known',
        SCALED | {'max_seq_len': 9000, 'rope_scaling_factor': 4},
        128256,
        9000,
        4.0,
    ),
]


@pytest.mark.parametrize(('name', 'changes', 'vocab', 'context', 'factor'), SHAPES)
def test_released_models_are_known_by_their_shape(tmp_path, name, changes, vocab, context, factor):
    heads = changes.get('dim', 4096) // 128
    params = {'dim': 4096, 'n_layers': 32, 'n_heads': heads, 'norm_eps': 1e-5, 'multiple_of': 256}
    (tmp_path / 'params.json').write_text(json.dumps(params | changes))
    embedding = {'tok_embeddings.weight': np.zeros((vocab, 1), np.float16)}
    saved(tmp_path / 'consolidated.00.pth', embedding)
    config, _ = meta_files.read(tmp_path)
    assert config.context == context
    assert config.rope_scaling == (RopeScaling(factor=factor) if factor else None)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'max_seq_len': None}, 'such as "max_seq_len": 8192'),
        ({'max_seq_len': '8k'}, "max_seq_len = '8k' is no positive"),
        (SCALED, 'such as "rope_scaling_factor": 8 (8 for Llama 3.1'),
        ({'moe': {'num_experts': 8}}, "moe = {'num_experts': 8} is not supported"),
        (
            {'quantization_args': {'scheme': 'int4'}},
            'quantization_args says that',
        ),
        ({'vision_chunk_size': 448}, 'vision_chunk_size = 448'),
        ({'use_qk_norm': True}, 'use_qk_norm = True is not supported'),
        ({'use_biases': True}, 'use_biases = True is not supported'),
        ({'n_layers': None}, 'n_layers is missing'),
        ({'rope_theta': 'big'}, "rope_theta = 'big' is no positive number"),
        ({'vocab_size': 33}, 'vocab_size is 33, the embedding has 32 rows'),
    ],
)
def test_settings_that_are_unsaid_or_not_supported(tmp_path, changes, words):
    write(tmp_path, tensors_of(CONFIG)[1], params=PARAMS | changes)
    assert words in refused(tmp_path)


def test_unknown_settings_are_told(tmp_path, caplog):
    changes = {'max_batch_size': 6, 'vision_chunk_size': -1, 'novel': 1, 'moe': None}
    changes |= {'use_qk_norm': False, 'use_biases': False}
    write(tmp_path, tensors_of(CONFIG)[1], params=PARAMS | changes)
    assert meta_files.read(tmp_path)[0] == CONFIG
    assert [r.getMessage() for r in caplog.records] == ['params.json: novel not known, and ignored']


def test_the_tokenizer_is_beside_the_weights_or_above(tmp_path):
    model = tmp_path / 'llama-7b'
    model.mkdir()
    assert meta_files.tokenizer_of(model) == model
    (tmp_path / 'tokenizer.model').write_bytes(b'')
    assert meta_files.tokenizer_of(model) == tmp_path
    (model / 'tokenizer.model').write_bytes(b'')
    assert meta_files.tokenizer_of(model) == model

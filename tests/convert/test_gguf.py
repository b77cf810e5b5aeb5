"""GGUF files written here: what is read, bit for bit, and what is refused by name."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.convert import gguf, huggingface
from llama_jax.errors import UserError
from llama_jax.model.config import RopeScaling
from llama_jax.model.rope import frequencies
from tests.convert.written import architecture, tensors_of, write
from tests.parity.cases import CASES, weights

# Quantised rows are in blocks of 32.
CONFIG = replace(CASES['llama3'], layers=2, vocab=32, ffn=192)
TIED = replace(CASES['llama3_2'], layers=2, vocab=32, dim=96, ffn=192, rope_scaling=None)


def written(tmp_path, config, *, settings=(), tensors=(), **options):
    """A file of `config` with changes; and the parameters that it should hold."""
    theirs = weights(config, seed=3)
    changed = {**tensors_of(theirs, config), **dict(tensors)}
    path = write(
        tmp_path / 'model.gguf',
        {name: w for name, w in changed.items() if w is not None},
        {**architecture(config), **dict(settings)},
        **options,
    )
    return path, huggingface.params_from_huggingface(theirs, config)


def refused(tmp_path, config=CONFIG, **changes):
    path, _ = written(tmp_path, config, **changes)
    with pytest.raises(UserError) as error:
        gguf.load(path)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('config', [CONFIG, TIED], ids=['untied', 'tied'])
def test_architecture_and_parameters_come_back_as_they_were(tmp_path, config):
    path, expected = written(tmp_path, config)
    found, params, settings = gguf.load(path)
    assert found == config
    assert settings['llama.block_count'] == 2
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_parameters_do_not_change_with_the_file(tmp_path):
    path, expected = written(tmp_path, CONFIG)
    _, params, _ = gguf.load(path)
    with path.open('r+b') as file:
        file.write(bytes(path.stat().st_size))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_settings_that_a_file_may_leave_out(tmp_path):
    config = replace(CONFIG, head_dim=8, kv_heads=8, rope_theta=1e4)
    left_out = ('attention.head_count_kv', 'attention.key_length', 'rope.dimension_count')
    settings = {f'llama.{name}': None for name in (*left_out, 'rope.freq_base', 'vocab_size')}
    settings |= {'tokenizer.ggml.tokens': [str(i) for i in range(32)]}
    path, expected = written(tmp_path, config, settings=settings)
    found, params, _ = gguf.load(path)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_quantised_tensors_are_dequantised(tmp_path):
    from gguf import GGMLQuantizationType as Kind

    kinds = {
        'token_embd.weight': Kind.Q8_0,
        'blk.0.attn_q.weight': Kind.Q4_1,
        'blk.1.ffn_down.weight': Kind.F16,
        'blk.1.ffn_up.weight': Kind.BF16,
    }
    path, expected = written(tmp_path, CONFIG, kinds=kinds)
    _, params, _ = gguf.load(path)

    def error(get):
        return np.abs(get(params) - get(expected)).max() / np.abs(get(expected)).max()

    # A block of Q8_0 has 255 steps, one of Q4_1 has 15; half precision has 11 bits, bfloat16 8.
    for get, most in (
        (lambda p: p['embed_VD'], 1 / 254),
        (lambda p: p['blocks']['attention']['q_DNH'][0], 1 / 15),
        (lambda p: p['blocks']['mlp']['down_FD'][1], 2**-11),
        (lambda p: p['blocks']['mlp']['up_DF'][1], 2**-8),
    ):
        assert 0 < error(get) <= most
    assert not error(lambda p: p['blocks']['attention']['q_DNH'][1])


@pytest.mark.parametrize('factor', [8.0, 32.0])
def test_stretched_positions_are_read_from_their_factors(tmp_path, factor):
    scaling = RopeScaling(factor=factor)
    config = replace(CONFIG, rope_scaling=scaling, context=131072)
    plain, stretched = (
        np.asarray(frequencies(16, theta=config.rope_theta, scaling=s)) for s in (None, scaling)
    )
    assert len(np.unique((plain / stretched).round(2))) > 2  # one lies between none and all
    path, _ = written(tmp_path, config, tensors={'rope_freqs.weight': plain / stretched})
    assert gguf.load(path)[0] == config

    other = np.linspace(1, factor, 8, dtype=np.float32)
    path, _ = written(tmp_path, config, tensors={'rope_freqs.weight': other})
    found = gguf.load(path)[0].rope_scaling  # of no known rule: taken as they are
    np.testing.assert_allclose(found.short, other, rtol=1e-6)
    assert found.short == found.long


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'expert_count': 8}, 'expert_count = 8'),
        ({'attention.sliding_window': 4096}, 'attention.sliding_window = 4096'),
        ({'attention.value_length': 32}, 'attention.value_length = 32'),
        ({'rope.dimension_count': 8}, 'rope.dimension_count = 8'),
        ({'attention.head_count_kv': [4, 2]}, 'head_count_kv differs from layer to layer'),
        ({'attention.head_count_kv': 3}, '3 key-value heads'),
        ({'attention.layer_norm_rms_epsilon': None}, 'layer_norm_rms_epsilon is missing'),
        ({'vocab_size': None}, 'vocab_size is missing'),
        ({'logit_scale': 0.5}, 'logit_scale = 0.5'),
        ({'final_logit_softcapping': 30.0}, 'final_logit_softcapping = 30.0'),
        ({'attention.causal': False}, 'attention.causal = False'),
        ({'ssm.conv_kernel': 4}, 'ssm.conv_kernel = 4'),
    ],
)
def test_unsupported_setting_is_refused_by_name(tmp_path, change, named):
    settings = {f'llama.{name}': value for name, value in change.items()}
    assert named in refused(tmp_path, settings=settings)


def test_what_says_nothing_of_its_own_is_accepted(tmp_path):
    settings = {'rope.scaling.type': 'none', 'expert_count': 0, 'attention.causal': True}
    settings |= {'attention.head_count_kv': [4, 4], 'rope.scaling.finetuned': False}
    settings |= {'expert_used_count': 2, 'logit_scale': 1.0, 'attention.scale': 0.0}
    settings |= {'pooling_type': 3, 'final_logit_softcapping': 0.0, 'nextn_predict_layers': 0}
    path, _ = written(
        tmp_path, CONFIG, settings={f'llama.{name}': value for name, value in settings.items()}
    )
    assert gguf.load(path)[0] == CONFIG


def test_what_nobody_knows_is_passed_over_and_told(tmp_path, caplog):
    path, _ = written(tmp_path, CONFIG, settings={'llama.of_the_future': 3})
    assert gguf.load(path)[0] == CONFIG
    assert [r.getMessage() for r in caplog.records] == [
        'GGUF: llama.of_the_future = 3 is not known here, and passed over'
    ]


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'blk.1.ffn_up.weight': None}, "'blk.1.ffn_up.weight' is missing"),
        ({'blk.2.ffn_up.weight': np.zeros((192, 64), np.float32)}, "'blk.2.ffn_up.weight' has no"),
        ({'blk.0.attn_q.bias': np.zeros(128, np.float32)}, "'blk.0.attn_q.bias' has no place"),
        ({'token_embd.weight': np.zeros((33, 64), np.float32)}, 'vocab 33, the settings say 32'),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, named):
    assert named in refused(tmp_path, tensors=change)


def test_types_that_cannot_be_read_are_refused_by_name(tmp_path):
    change = {'blk.1.attn_norm.weight': np.ones(64, np.int32)}
    path, _ = written(tmp_path, CONFIG, tensors=change)
    with pytest.raises(UserError, match="'blk.1.attn_norm.weight' is of type I32"):
        gguf.read(path)  # before any tensor is


@pytest.mark.parametrize(
    'kind', ['F16', 'BF16', 'Q8_0', 'Q5_1', 'Q4_K', 'Q6_K', 'IQ4_NL', 'IQ2_XXS', 'TQ1_0']
)
def test_tensors_have_the_type_of_the_file_or_float32(tmp_path, kind):
    import gguf as package

    kind = package.GGMLQuantizationType[kind]
    block, size = package.GGML_QUANT_SIZES[kind]
    raw = np.random.RandomState(0).bytes(6 * 512 // block * size)
    raw = np.frombuffer(raw, np.uint8).reshape(6, -1) & 0x3F  # no scale is infinite
    writer = package.GGUFWriter(tmp_path / 'a.gguf', 'llama')
    writer.add_tensor('w', raw, raw_dtype=kind)
    for step in ('header', 'kv_data', 'tensors'):
        getattr(writer, f'write_{step}_to_file')()
    writer.close()
    tensors = gguf.read(tmp_path / 'a.gguf').tensors
    assert tensors.shape('w') == (6, 512)
    assert tensors.dtype('w') == tensors['w'].dtype
    assert tensors.dtype('w') == {'F16': 'float16', 'BF16': 'bfloat16'}.get(kind.name, 'float32')
    expected = package.dequantize(raw, kind)
    np.testing.assert_array_equal(tensors['w'].astype(np.float32), expected)


def test_other_architectures_are_refused(tmp_path):
    assert "general.architecture = 'qwen2'" in refused(tmp_path, architecture='qwen2')


@pytest.fixture
def parts(tmp_path):
    """Three parts as llama.cpp splits a file: the first has the settings, each some tensors."""
    tensors = tensors_of(weights(CONFIG, seed=3), CONFIG)
    paths = [tmp_path / f'a-{i}-of-00003.gguf' for i in ('00001', '00002', '00003')]
    for i, path in enumerate(paths):
        names = list(tensors)[len(tensors) * i // 3 : len(tensors) * (i + 1) // 3]
        part = {'split.no': i, 'split.count': 3, 'split.tensors.count': len(tensors)}
        settings = part | (architecture(CONFIG) if i == 0 else {})
        write(path, {name: tensors[name] for name in names}, settings)
    return paths


@pytest.mark.parametrize('named', range(3))
def test_any_part_names_the_whole(parts, named):
    config, params, _ = gguf.load(parts[named])
    assert config == CONFIG
    expected = huggingface.params_from_huggingface(weights(CONFIG, seed=3), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_parts_that_do_not_belong_together(parts):
    def message(path):
        with pytest.raises(UserError) as error:
            gguf.read(path)
        return str(error.value)

    one, two, three = parts
    three.rename(away := three.with_name('away'))
    assert 'missing beside it: a-00003-of-00003.gguf' in message(two)
    away.write_bytes(two.read_bytes())
    away.rename(three)
    assert 'a-00003-of-00003.gguf holds part 1 of another' in message(one) or (
        'a-00003-of-00003.gguf holds the tensor' in message(one)
    )
    settings = {'split.no': 2, 'split.count': 3}
    write(three, {}, settings)
    assert 'tensors of 21' in message(one)
    write(three, {'output.weight': np.zeros((32, 64), np.float32)}, {'split.no': 2})
    assert 'a-00003-of-00003.gguf holds' in message(one)
    one.rename(one.with_name('model.gguf'))
    assert 'model-00001-of-00003.gguf' in message(one.with_name('model.gguf'))


def test_files_that_are_none(tmp_path):
    path, _ = written(tmp_path, CONFIG)
    content = path.read_bytes()
    with pytest.raises(UserError, match='nowhere.gguf is missing'):
        gguf.load(tmp_path / 'nowhere.gguf')
    for damaged, what in {
        b'': 'empty',
        b'GG': "a text that begins 'GG'",
        b'PK' + content[2:]: 'does not begin',
        b'version https://git-lfs.github.com/spec/v1\noid sha256:0': 'git lfs pull',
        b'\n<!DOCTYPE html><html>': 'web page',
        content[:100]: 'ends too early',
        content[:-100]: "tensor '.*' is cut off",
    }.items():
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f'model.gguf is .*{what}') as error:
            gguf.load(path)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('attention.head_count', 0),
        ('context_length', 'x'),
        ('rope.freq_base', 0.0),
        ('attention.layer_norm_rms_epsilon', float('nan')),
    ],
)
def test_settings_that_are_no_positive_number(tmp_path, name, value):
    message = refused(tmp_path, settings={f'llama.{name}': value})
    assert f'llama.{name} = ' in message and 'is no positive number' in message


def test_more_layers_than_there_are(tmp_path):
    message = refused(tmp_path, settings={'llama.block_count': 10**9})
    assert 'blk.999999999.' in message and 'is missing' in message
    assert 'is one of x parts' in refused(tmp_path, settings={'split.count': 'x'})

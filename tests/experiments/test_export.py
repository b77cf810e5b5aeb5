"""Models written for other programs, read back bit for bit."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from experiments import export, models
from llama_jax import mesh as meshes
from llama_jax.convert import ggml_vocabulary, gguf, huggingface, pretrained
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import LongRope
from llama_jax.model.patterns import Window
from llama_jax.text import template_files
from llama_jax.text.chat import FORMATS, end_ids
from llama_jax.text.files import tokenizer_of
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.template import Template
from tests.convert import run as runs
from tests.convert import written
from tests.data.corpus import CHINESE
from tests.experiments.exported import CONFIG, refused, run, tokenizer
from tests.parity.cases import weights
from tests.text.learnt import sentencepiece_model

__all__ = ['run', 'tokenizer']

TEXTS = ('', 'def f(x):\n    return "a"\t', *CHINESE[:2], '\U0001f600 e\u0301 \x00', '  a   b ')


def as_read(config, params, cast=lambda w: w):
    """What should come back: rows of tokens, each matrix in another type."""
    config = replace(config, vocab=config.ids, vocab_padding=0)

    def leaf(path, w):
        name = jax.tree_util.keystr(path)
        w = w[: config.ids] if 'VD' in name else w
        return w if 'scale' in name else np.asarray(cast(w), np.float32)

    return config, jax.tree_util.tree_map_with_path(leaf, params)


def assert_equal(found, expected):
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def tensor_sizes(path):
    """Bytes of each tensor of a file of safetensors, in their order."""
    start = 8 + int.from_bytes(path.read_bytes()[:8], 'little')
    assert start % 8 == 0  # as the format demands
    header = json.loads(path.read_bytes()[8:start])
    del header['__metadata__']
    return [end - begin for begin, end in (tensor['data_offsets'] for tensor in header.values())]


def test_a_run_for_transformers(run_script, run, tokenizer):
    path, config, params = run
    options = ('out', '--checkpoint', path, '--to', 'huggingface', '--shard-gigabytes', '5e-5')
    code, _, error = run_script(export.main, *options)
    assert code == 0 and error[-1].startswith('wrote out: ') and error[-1].endswith(', float32')
    assert_equal(huggingface.load(Path('out')), as_read(config, params))
    index = json.loads(Path('out/model.safetensors.index.json').read_text())
    files = sorted(path.name for path in Path('out').glob('*.safetensors'))
    assert len(files) > 1 and files == sorted(set(index['weight_map'].values()))
    assert files[0] == f'model-00001-of-{len(files):05}.safetensors'
    sizes = [tensor_sizes(Path('out', name)) for name in files]
    for here, behind in zip(sizes, [*sizes[1:], [50_000]], strict=True):
        assert len(here) == 1 or 0 < sum(here) <= 50_000
        assert sum(here) + behind[0] > 50_000
    assert sizes[0][0] > 50_000  # a tensor of more has a file of its own
    rows = huggingface.params_to_huggingface(params, config)['model.embed_tokens.weight']
    assert len(rows) == config.vocab  # all of them, where nothing is exported
    assert index['metadata']['total_size'] == sum(
        w.nbytes for w in jax.tree.leaves(as_read(config, params)[1])
    )
    assert not list(Path().glob('*.partial'))
    special = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': tokenizer.pad_id}
    assert json.loads(Path('out/generation_config.json').read_text()) == special
    assert special.items() <= json.loads(Path('out/config.json').read_text()).items()
    found = pretrained.find('out').text()
    assert found.begin == (1,) and found.vocabulary.digest == tokenizer.digest
    assert found.chat is None


@pytest.mark.parametrize('kind', ['tokenizer.model', 'tokenizer.json'])
def test_tokens_that_a_model_has_no_rows_for_are_left_out(run_script, tmp_path, kind):
    from tokenizers import Tokenizer

    theirs = tmp_path / kind
    theirs.write_bytes(
        written.trained().to_str().encode()
        if kind.endswith('json')
        else sentencepiece_model(CHINESE, vocab_size=400, hard_vocab_limit=True)
    )
    whole = tokenizer_of(theirs)
    config = replace(CONFIG, vocab=whole.pad_id)  # ours are behind theirs
    path = runs.save(tmp_path / 'run', config, runs.random_params(config), whole)
    (path / 'tokenizer.model').unlink()
    whole.save_to(path)
    assert run_script(export.main, 'out', '--checkpoint', path, '--to', 'huggingface')[0] == 0
    found = Tokenizer.from_file('out/tokenizer.json')
    assert found.get_vocab_size() == config.vocab
    assert max(found.encode('a <mask> 你好').ids) < config.vocab
    for name in ('config.json', 'generation_config.json'):
        assert json.loads(Path('out', name).read_text())['pad_token_id'] == whole.eos_id
    back = tokenizer_of('out')
    np.testing.assert_array_equal(back.encode('a <mask> 你好'), whole.encode('a <mask> 你好'))


@pytest.mark.parametrize('out', ['out', 'out.gguf'])
def test_a_run_that_chats(run_script, run, tmp_path, out):
    path = shutil.copytree(run[0], tmp_path / 'run')
    chat = Template('{{ messages[0].content }}', {'bos_token': '<s>'}, {'rag': 'x'})
    template_files.keep(chat, path)
    model = models.from_run(path, meshes.make(MeshConfig(), jax.devices()[:1]))
    assert model.chat == chat
    to = 'gguf' if out.endswith('gguf') else 'huggingface'
    assert run_script(export.main, out, '--checkpoint', path, '--to', to)[0] == 0
    assert pretrained.find(out).text().chat.source == chat.source


def test_formats_of_runs(tmp_path):
    for chat in (*FORMATS.values(), Template('a', None)):
        template_files.keep(chat, tmp_path)
        assert template_files.kept(tmp_path) == chat
    template_files.keep(None, tmp_path)
    assert template_files.kept(tmp_path) is None
    for content in ('[', '{"format": "x"}', '{"format": 1}', '{"a": 1}', '[]', '[' * 100_000):
        (tmp_path / 'chat.json').write_text(content)
        with pytest.raises(UserError, match='chat.json is damaged'):
            template_files.kept(tmp_path)


def test_tokenizer_json_gives_the_ids_of_the_run(run_script, run, tokenizer):
    from tokenizers import Tokenizer

    run_script(export.main, 'out', '--checkpoint', run[0], '--to', 'huggingface')
    theirs = Tokenizer.from_file('out/tokenizer.json')
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text).ids == [tokenizer.bos_id, *ids]
        assert theirs.decode(ids) == text
    control = tokenizer.control['<sentinel_3>']
    assert theirs.encode('a<sentinel_3>').ids[-1] == control
    assert theirs.decode([control]) == ''
    settings = json.loads(Path('out/tokenizer_config.json').read_text())
    assert settings['tokenizer_class'] == 'PreTrainedTokenizerFast' and settings['add_bos_token']
    assert [settings[f'{x}_token'] for x in ('bos', 'eos', 'unk')] == ['<s>', '</s>', '<unk>']


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_is_rounded_to_nearest(run_script, run, dtype):
    path, config, params = run
    run_script(export.main, 'out', '--checkpoint', path, '--to', 'huggingface', '--dtype', dtype)
    types = {'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
    expected = jax.tree.map(
        lambda w: w.astype(types[dtype]).astype(np.float32), as_read(config, params)[1]
    )
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(Path('out'))[1], expected)
    # And from there, without another rounding.
    _, _, error = run_script(export.main, 'again', '--weights', 'out', '--to', 'huggingface')
    assert error[-1].endswith(dtype)
    for name in os.listdir('out'):
        if name != 'config.json':
            assert Path('again', name).read_bytes() == Path('out', name).read_bytes(), name


def q8_0(w):
    """As ggml rounds blocks of 32 along the rows; `w` is ours, so the rows are turned first."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    kind = GGMLQuantizationType.Q8_0
    return dequantize(quantize(np.ascontiguousarray(w), kind), kind)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16', 'q8_0'])
def test_a_run_for_llama_cpp(run_script, run, tokenizer, dtype):
    path, config, params = run
    options = ['out.gguf', '--checkpoint', path, '--to', 'gguf']
    code, _, error = run_script(export.main, *options, '--dtype', dtype)
    assert code == 0 and error[-1].endswith(dtype)
    found = gguf.load(Path('out.gguf'))
    types = {'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16, 'float32': np.float32}
    cast = (lambda w: w.astype(types[dtype])) if dtype in types else (lambda w: w)
    expected = as_read(config, params, cast)
    if dtype in types:
        assert_equal(found[:2], expected)
    else:
        np.testing.assert_array_equal(found[1]['embed_VD'], q8_0(expected[1]['embed_VD']))
        down_LDF = expected[1]['blocks']['mlp']['down_FD'].swapaxes(1, 2)
        np.testing.assert_array_equal(
            found[1]['blocks']['mlp']['down_FD'], q8_0(down_LDF).swapaxes(1, 2)
        )
    text = pretrained.find('out.gguf').text()
    assert text.begin == (1,) and text.vocabulary.end_ids == (2,)
    for words in TEXTS:
        assert text.vocabulary.encode(words).tolist() == tokenizer.encode(words).tolist()
    settings = found[2]
    assert settings['tokenizer.ggml.padding_token_id'] == tokenizer.pad_id
    assert settings['general.name'] == 'run' and settings['general.file_type'] in (0, 1, 7, 32)


@pytest.mark.parametrize(
    ('dtype', 'down', 'up'),
    [('q8_0', 'F16', 'Q8_0'), ('float32', 'F32', 'F32'), ('bfloat16', 'BF16', 'BF16')],
)
def test_rows_that_blocks_do_not_divide(run_script, tmp_path, dtype, down, up):
    from gguf import GGUFReader

    config = replace(CONFIG, vocab=399, ffn=48)
    path = runs.save(tmp_path / 'm', config, runs.random_params(config), bytes_tokenizer())
    options = ('o.gguf', '--checkpoint', path, '--to', 'gguf', '--dtype', dtype)
    assert run_script(export.main, *options)[0] == 0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader('o.gguf').tensors}
    assert kinds['blk.1.ffn_down.weight'] == down and kinds['blk.1.ffn_up.weight'] == up
    assert {kind for name, kind in kinds.items() if 'norm' in name} == {'F32'}
    settings = gguf.read(Path('o.gguf')).settings
    number = {'q8_0': 7, 'float32': 0, 'bfloat16': 32}[dtype]
    assert settings['general.file_type'] == number
    assert settings['general.quantization_version'] == 2


def test_positions_of_another_kind(run_script, tmp_path):
    scaling = LongRope((1.0,) * 8, (4.0,) * 8, original_context=64, attention_factor=1.5)
    config = replace(CONFIG, vocab=399, rope_scaling=scaling)
    path = runs.save(tmp_path / 'm', config, runs.random_params(config), bytes_tokenizer())
    for out, to in {'o': 'huggingface', 'o.gguf': 'gguf'}.items():
        run_script(export.main, out, '--checkpoint', path, '--to', to)
        assert pretrained.find(out).config == config
    path = runs.save(tmp_path / 'w', replace(config, pattern=Window(9)), {}, bytes_tokenizer())
    assert 'no Window(size=9)' in refused(
        run_script, 'w.gguf', '--checkpoint', path, '--to', 'gguf'
    )


def byte_level(path, kinds=(), **settings):
    """A GGUF file with a byte-level vocabulary."""
    config = replace(CONFIG, vocab=512, rope_scaling=None)
    return written.write(
        path,
        written.tensors_of(weights(config, seed=3), config),
        written.architecture(config) | written.vocabulary() | settings,
        kinds=kinds,
    )


def test_weights_of_others_and_back(run_script, tmp_path):
    named = {'tokenizer.chat_template.tool_use': '{{ tools }}'}
    first = byte_level(tmp_path / 'first.gguf', **{'general.license': 'mit'}, **named)
    run_script(export.main, 'hf', '--weights', first, '--to', 'huggingface')
    run_script(export.main, 'back.gguf', '--weights', 'hf', '--to', 'gguf', '--dtype', 'float32')
    run_script(export.main, 'same.gguf', '--weights', first, '--to', 'gguf', '--dtype', 'float32')
    expected = gguf.load(first)
    for path in ('hf', 'back.gguf', 'same.gguf'):
        found = pretrained.find(path)
        loaded = huggingface.load(Path(path)) if path == 'hf' else gguf.load(Path(path))
        assert_equal(loaded[:2], expected[:2])
        text = found.text()
        assert text.begin == ()
        assert end_ids(text.chat, text.vocabulary) == (2, 0)
        for words in TEXTS[1:4]:
            assert text.vocabulary.decode(text.vocabulary.encode(words)) == words
    template = expected[2]['tokenizer.chat_template']
    assert Path('hf/chat_template.jinja').read_text() == template
    run_script(export.main, 'again', '--weights', 'hf', '--to', 'huggingface')
    for folder in ('hf', 'again'):
        text = pretrained.find(folder).text()
        assert text.chat.named == {'tool_use': '{{ tools }}'} and text.chat.source == template
    theirs, same = (gguf.load(Path(name))[2] for name in ('back.gguf', 'same.gguf'))
    assert theirs['tokenizer.chat_template'] == template and same['general.license'] == 'mit'
    for name in ('pre', 'merges', 'model'):
        key = f'tokenizer.ggml.{name}'
        assert theirs[key] == same[key] == expected[2][key]


def test_mixed_types_are_held_by_float32(run_script, tmp_path):
    from gguf import GGMLQuantizationType as Kind

    kinds = {'token_embd.weight': Kind.F16, 'output.weight': Kind.BF16}
    first = byte_level(tmp_path / 'first.gguf', kinds=kinds)
    _, _, error = run_script(export.main, 'hf', '--weights', first, '--to', 'huggingface')
    assert error[-1].endswith(', float32')
    assert_equal(huggingface.load(Path('hf')), gguf.load(first)[:2])


def test_a_token_for_every_row_and_a_row_for_every_token():
    settings = {f'tokenizer.ggml.{name}': [1, 2] for name in ('tokens', 'token_type', 'scores')}
    settings |= {'tokenizer.ggml.eos_token_id': 1, 'tokenizer.ggml.padding_token_id': 2}
    more, fewer = (ggml_vocabulary.fitted(settings, rows) for rows in (4, 1))
    assert more['tokenizer.ggml.tokens'] == [1, 2, '[PAD2]', '[PAD3]']
    assert more['tokenizer.ggml.token_type'] == [1, 2, 5, 5]
    assert len(more['tokenizer.ggml.scores']) == 4 and more['tokenizer.ggml.padding_token_id'] == 2
    assert fewer['tokenizer.ggml.tokens'] == [1]
    assert not [name for name in fewer if name.endswith('_id')]

"""What an export refuses before it reads, and what is left where it could not end."""

import fcntl
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import export
from llama_jax.convert import pretrained, whole
from llama_jax.errors import UserError
from llama_jax.objectives.masked import MaskedLM
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from tests.convert import run as runs
from tests.experiments.exported import CONFIG, refused, run, tokenizer

__all__ = ['run', 'tokenizer']


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['o.gguf', '--to', 'gguf'], 'either --checkpoint DIRECTORY or --weights NAME'),
        (['o', '--to', 'gguf', '--weights', 'x'], 'o: --to gguf writes a file that ends in .gguf'),
        (['o.gguf', '--to', 'huggingface', '--weights', 'x'], 'writes a directory'),
        (['o', '--to', 'huggingface', '--weights', 'x', '--dtype', 'q8_0'], 'q8_0 is of GGUF'),
        (['o', '--to', 'huggingface', '--weights', 'x', '--shard-gigabytes', '0'], 'positive'),
        (['o.gguf', '--to', 'gguf', '--weights', 'x', '--shard-gigabytes', '1'], 'has shards'),
        (['o', '--to', 'huggingface', '--checkpoint', 'x'], 'x holds no run'),
        (['o', '--to', 'huggingface', '--weights', 'x'], "no weights are called 'x'"),
        (['full', '--to', 'huggingface', '--weights', 'x'], 'full is there already'),
        (['there.gguf', '--to', 'gguf', '--weights', 'x'], 'there.gguf is there already'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_options_that_do_not_fit(run_script, options, words):
    Path('full').mkdir()
    Path('full/a').touch()
    Path('there.gguf').mkdir()
    assert words in refused(run_script, *options)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'norm': 'layer', 'mlp': 'gelu', 'positions': 'learned'}, 'norm layer'),
        ({'bias': True}, 'bias'),
        ({'encoder_layers': 1}, 'encoder_layers'),
    ],
    ids=lambda value: '',
)
@pytest.mark.parametrize('out', [('o', 'huggingface'), ('o.gguf', 'gguf')])
def test_what_they_do_not_have_is_refused_before_it_is_read(
    run_script, tmp_path, change, words, out
):
    config = replace(CONFIG, vocab=399, rope_scaling=None, **change)
    path = runs.save(tmp_path / 'other', config, {}, bytes_tokenizer())
    assert words in refused(run_script, out[0], '--checkpoint', path, '--to', out[1])
    assert not Path(out[0]).exists()


def test_objectives_that_do_not_teach_to_continue(run_script, tmp_path):
    config = replace(CONFIG, vocab=399)
    params = runs.random_params(config)
    path = runs.save(tmp_path / 'm', config, params, bytes_tokenizer(), objective=MaskedLM())
    code, _, error = run_script(export.main, 'o.gguf', '--checkpoint', path, '--to', 'gguf')
    assert code == 0 and 'MaskedLM' in error[0]


@pytest.mark.parametrize('value', [1e6, np.nan])
def test_numbers_that_cannot_be_written(run_script, tmp_path, value):
    config = replace(CONFIG, vocab=399)
    params = runs.random_params(config)
    params['blocks']['mlp']['down_FD'][1, 2, 3] = value
    path = runs.save(tmp_path / 'm', config, params, bytes_tokenizer())
    for out, to in {'o': 'huggingface', 'o.gguf': 'gguf'}.items():
        message = refused(run_script, out, '--checkpoint', path, '--to', to, '--dtype', 'float16')
        assert {'o': "'model.layers.1.mlp.down_proj.weight'"}.get(out, "'blk.1.ffn_d") in message
        assert ('not finite' if np.isnan(value) else 'bfloat16') in message
        assert [p.name for p in Path().iterdir() if p.name.startswith('o')] == []


def test_a_full_disk(run_script, run, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for out, to in {'o': 'huggingface', 'o.gguf': 'gguf'}.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            message = refused(run_script, out, '--checkpoint', run[0], '--to', to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f'{out} could not be written' in message and 'nothing of it is left' in message
        assert list(Path().glob('o*')) == []
        with monkeypatch.context() as patch:
            usage = type('Usage', (), {'free': 1000})
            patch.setattr('shutil.disk_usage', lambda path, usage=usage: usage)
            message = refused(run_script, out, '--checkpoint', run[0], '--to', to)
        assert '1 kB are free' in message and list(Path().glob('o*')) == []


def test_packages_that_are_not_there(run_script, run, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    for out, to, package in ('o', 'huggingface', 'tokenizers'), ('o.gguf', 'gguf', 'gguf'):
        message = refused(run_script, out, '--checkpoint', run[0], '--to', to)
        assert message == f"error: --to {to} takes {package}: pip install -e '.[weights]'"


def test_files_are_closed(tmp_path):
    before = os.listdir('/proc/self/fd') if Path('/proc').exists() else []
    for directory in (False, True):
        with whole.written(tmp_path / f'{directory}', size=0, directory=directory):
            pass
        with pytest.raises(UserError), whole.written(tmp_path / 'x', size=2**80):
            pass
    after = os.listdir('/proc/self/fd') if Path('/proc').exists() else []
    assert len(after) == len(before)


@pytest.mark.parametrize(('out', 'to'), [('o', 'huggingface'), ('o.gguf', 'gguf')])
def test_what_a_killed_export_left(run_script, run, out, to):
    options = (out, '--checkpoint', run[0], '--to', to)
    partial = Path(f'{out}.partial')
    if to == 'gguf':
        partial.write_bytes(b'GGUF' + bytes(10**7))
    else:
        partial.mkdir()
        (partial / 'model-00001-of-00009.safetensors').write_bytes(b'x')
        (partial / 'notes').touch()
        assert 'notes, which is not of an export' in refused(run_script, *options)
        (partial / 'notes').unlink()
        Path(out).mkdir()  # an empty directory is as good as none
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert 'is being written by another process' in refused(run_script, *options)
    os.close(lock)
    assert partial.exists()
    code, _, _ = run_script(export.main, *options)
    assert code == 0 and not partial.exists()
    assert pretrained.find(out).config.dim == CONFIG.dim
    if to == 'huggingface':
        assert len(list(Path(out).glob('*.safetensors'))) == 1
    else:
        assert Path(out).stat().st_size < 10**6
    assert 'is there already' in refused(run_script, *options)

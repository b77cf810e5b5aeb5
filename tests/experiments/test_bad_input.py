"""Bad input on the command line: one line which names the thing and the remedy, exit code 2, and
nothing is compiled before."""

import errno
import json
import os
from pathlib import Path

import pytest

import configs
from experiments import compare, evaluate, generate, pretrain, report
from llama_jax.data.config import cache_dir
from llama_jax.train import run
from llama_jax.train.experiment import to_dict


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch):
    def never(*args, **settings):
        raise AssertionError('this was to be refused before compilation')

    monkeypatch.setattr(run, 'train_step', never)
    monkeypatch.setattr(run, 'initial_state', never)


@pytest.fixture
def refused(run_script, text):
    """Runs pretrain with a tiny experiment and the options of the test; the one line of error."""

    def refused(*options, base=()):
        tiny = {
            'data.sources.0.name': 'text_files',
            'data.sources.0.files': text,
            'data.tokenizer.vocab': 512,
            'model.vocab': 512,
            **dict(base),
        }
        given = {name: value for name, value in tiny.items() if value is not None}
        arguments = [part for name, value in given.items() for part in (f'--{name}', value)]
        code, _, error = run_script(pretrain.main, 'quickstart', *arguments, *options)
        assert code == 2, error
        assert len(error) == 1 and error[0].startswith('error: '), error
        return error[0]

    return refused


def test_unknown_configuration(run_script):
    code, _, error = run_script(pretrain.main, 'quikstart')
    assert code == 2
    assert error == ["error: no configuration is called 'quikstart': did you mean 'quickstart'?"]


def test_misspelt_option(run_script):
    code, out, error = run_script(pretrain.main, 'quickstart', '--train.stpes', '5')
    assert code == 2
    assert '--train.stpes' in out + '\n'.join(error)
    assert '--train.steps' in out + '\n'.join(error)


@pytest.mark.parametrize(
    ('script', 'given', 'meant'),
    [
        (generate, '--weigths', '--weights'),
        (generate, '--quantization.weigths', '--quantization.weights'),
        (evaluate, '--form', '--from'),
        (evaluate, '--no-wn', '--no-own'),
        (evaluate, '--suite.per-topics', '--suite.per-topic'),
    ],
)
def test_misspelt_option_of_a_script_without_a_configuration(run_script, script, given, meant):
    code, out, (line,) = run_script(script.main, given, 'x')
    assert (code, out) == (2, '')
    assert line.startswith(f'error: there is no option {given}: did you mean {meant}?')


def test_no_configuration_lists_them(run_script):
    code, out, _ = run_script(pretrain.main)
    assert code == 2 and 'quickstart' in out and 'llama3_1_405b' in out
    assert run_script(pretrain.main, '--help')[0] == 0


@pytest.mark.parametrize(
    'options, words',
    [
        (['--train.steps', '-5'], '--train.steps is -5'),
        (['--train.batch', '0'], '--train.batch is 0'),
        (['--train.seq-len', '0'], '--train.seq-len is 0'),
        (['--train.accumulate', '0'], '--train.accumulate is 0'),
        (['--checkpoint.keep', '0'], '--checkpoint.keep is 0'),
        (['--checkpoint.every', '-1'], '--checkpoint.every is -1'),
        (['--evaluation.every', '-1'], '--evaluation.every is -1'),
        (['--seed', '-1'], '--seed is -1'),
        (
            ['--train.steps', '9', '--optimizer.schedule.warmup-steps', '9'],
            'warm-up of 9 steps leaves',
        ),
        (['--optimizer.schedule.peak', 'nan'], '--optimizer.schedule.peak is nan'),
        (['--optimizer.beta2', '1'], '--optimizer.beta2 is 1'),
        (['--model.dropout', '2'], 'model.dropout 2.0 is not in [0, 1)'),
        (['--model.layers', '0'], 'model.layers is 0'),
        (['--model.kv-heads', '0'], 'model.kv_heads is 0'),
        (['--model.kv-heads', '3'], '4 heads cannot share 3 key-value heads'),
        (['--model.head-dim', '7'], 'model.head_dim 7 is odd'),
        (['--train.seq-len', '1024'], 'train.seq_len 1024 is longer than the model context 512'),
        (['--train.batch', '12'], 'make --train.batch a multiple of 8'),
        (['--train.accumulate', '3'], '3 microbatches: change --train.batch'),
        (['--train.accumulate', '2'], 'make --train.batch a multiple of 16'),
        (['--mesh.fsdp', '2', '--mesh.tensor', '4'], 'key-value heads (2) does not divide'),
        (['--mesh.fsdp', '3'], 'does not fit 8 device(s)'),
        (['--mesh.fsdp', '0'], 'sizes are positive'),
        (['--model.vocab', '513', '--mesh.tensor', '2'], 'vocabulary (513) does not divide'),
        (['--model.vocab', '500'], 'data.tokenizer.vocab is 512, but the model has 500 ids'),
        (['--data.sources.0.weight', '0'], "weight of 'text_files' is 0"),
        (['--data.workers', '-1'], '--data.workers is -1'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_settings_without_sense_or_that_do_not_fit(refused, options, words):
    assert words in refused(*options)


def test_data_set_that_is_not_there(refused):
    elsewhere = {'data.sources.0.name': 'wikipedia/20990101.xx', 'data.sources.0.files': None}
    line = refused(base=elsewhere.items())
    assert "no data set 'wikipedia/20990101.xx'" in line and 'download_and_prepare' in line
    line = refused(base={'data.sources.0.files': 'nowhere/*.txt'}.items())
    assert "no file matches 'nowhere/*.txt'" in line
    line = refused(base={'data.sources.0.name': 'python_corpus/stdlib_docs'}.items())
    assert 'files has no effect' in line and '--data.sources.0.name text_files' in line


def test_empty_and_binary_files(refused, tmp_path):
    for name, content, words in (
        ('empty.txt', b'', 'holds no text'),
        ('blank.txt', b' \n\n', 'holds no text'),
        ('binary.txt', b'GIF89a\0\1', 'is binary'),
        ('latin1.txt', 'Stra\xdfe'.encode('latin-1'), 'is no UTF-8 text'),
    ):
        (tmp_path / name).write_bytes(content)
        line = refused(base={'data.sources.0.files': tmp_path / name}.items())
        assert name in line and words in line


def test_tokenizer_that_is_none(refused, tmp_path):
    (tmp_path / 'prose.model').write_text('This is no tokenizer.')
    assert 'prose.model' in refused('--data.tokenizer.path', tmp_path / 'prose.model')
    assert 'missing.model' in refused('--data.tokenizer.path', tmp_path / 'missing.model')


def test_working_directory_of_another_experiment(refused, tmp_path):
    saved = json.loads(json.dumps(to_dict(configs.get('quickstart'))))
    saved['train']['batch'] = 16
    (tmp_path / 'run.json').write_text(json.dumps({'experiment': saved}))
    (tmp_path / 'checkpoints' / '80').mkdir(parents=True)
    line = refused('--workdir', tmp_path)
    assert str(tmp_path) in line and 'train.batch: 16 -> 8' in line and '--workdir' in line
    (tmp_path / 'run.json').write_text('{"experiment": {"tr')
    assert 'run.json cannot be read' in refused('--workdir', tmp_path)


@pytest.mark.parametrize(
    'options, words',
    [
        (['--workdir', 'gs://b/run'], '--workdir gs://b/run is no path of this machine: mount'),
        (['--start', 'gs://b/run@4'], '--start gs://b/run@4 is no path of this machine'),
        (['--start', 'nowhere'], 'nowhere holds no run'),
        (
            ['--data.tokenizer.path', 's3://b/t.model'],
            's3://b/t.model is no path of',
        ),
        (['--data.sources.0.data-dir', 'gs://b/d'], "data_dir of 'text_files' gs://b/d is no path"),
        (['--workdir', '~nobody-here/run'], '--workdir ~nobody-here/run: Could not determine'),
    ],
    ids=str,
)
def test_places_that_are_no_paths(refused, options, words, tmp_path):
    before = set(tmp_path.iterdir())
    assert words in refused(*options)
    assert set(tmp_path.iterdir()) <= before | {tmp_path / 'runs'}


def test_a_bucket_without_the_package_that_reads_it(refused):
    pytest.importorskip('etils')
    bucket = {'data.sources.0.name': 'wiki', 'data.sources.0.data-dir': 'gs://b'}
    line = refused(base={**bucket, 'data.sources.0.files': None}.items())
    assert "'wiki' in gs://b: " in line and 'gcsfs' in line and 'mount the bucket' in line


def test_a_cache_that_is_no_path(refused, monkeypatch):
    monkeypatch.setenv('LLAMA_JAX_CACHE', 'gs://b/c')
    assert 'LLAMA_JAX_CACHE gs://b/c is no path of this machine' in refused()
    monkeypatch.setenv('LLAMA_JAX_CACHE', '~/c')
    assert cache_dir() == Path.home() / 'c'


@pytest.mark.parametrize(
    'script, arguments',
    [
        (evaluate, ['gs://b/run']),
        (report, ['gs://b/run']),
        (generate, ['--prompt', 'a', '--checkpoint', 'gs://b/run@best']),
        (generate, ['--prompt', 'a', '--weights', 'gs://b/model.gguf']),
        (compare, ['objectives_small', '--workdir', 'gs://b/run']),
        (evaluate, ['run', '--output', 'gs://b/run.json']),
    ],
    ids=str,
)
def test_scripts_refuse_urls_by_name(run_script, script, arguments):
    code, _, error = run_script(script.main, *arguments)
    assert code == 2 and len(error) == 1, error
    assert 'gs://b/' in error[0] and 'is no path of this machine' in error[0]


def test_a_result_with_nowhere_to_go(run_script, tmp_path):
    code, _, (line,) = run_script(evaluate.main, 'nowhere')
    assert code == 2 and line.startswith('error: nowhere holds no run: give the --workdir of')
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'config.json').write_text('{}')
    for other in (tmp_path / 'theirs', 'smollm2'):
        code, _, (line,) = run_script(evaluate.main, other)
        assert code == 2 and f'{other} holds no run: these are weights of others, for --w' in line
    code, _, (line,) = run_script(evaluate.main, 'run', '--output', tmp_path / 'no' / 'x.json')
    assert code == 2 and 'there is no directory' in line


def test_working_directory_that_is_a_file(refused, tmp_path):
    (tmp_path / 'file').write_text('')
    line = refused('--workdir', tmp_path / 'file')
    assert str(tmp_path / 'file') in line and 'another --workdir' in line


def test_no_room_on_the_disk(run_script):
    def script():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'runs/x/metrics.jsonl')

    code, _, (line,) = run_script(script)
    assert code == 2
    assert line.startswith('error: runs/x/metrics.jsonl: No space left on device: free some space')


def test_an_error_of_ours_keeps_its_traceback(run_script):
    def script():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(script)


def test_a_run_of_a_grid_is_not_marked_as_finished(run_script, tmp_path):
    run = tmp_path / 'grid' / 'causal' / 'seed-0'
    run.mkdir(parents=True)
    (tmp_path / 'grid' / 'grid.json').write_text('{}')
    code, _, error = run_script(evaluate.main, run)
    assert code == 2 and len(error) == 1 and 'give --output FILE' in error[0]
    for output in (tmp_path / 'own.json', run / 'own.json'):
        code, _, error = run_script(evaluate.main, run, '--output', output)
        assert code == 2 and 'holds no run' in error[0]

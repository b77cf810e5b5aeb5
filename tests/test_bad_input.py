"""Bad input at the command line: one line that names the thing and the remedy, and exit code 2."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from experiments import cli, pretrain

PROSE = (
    '話說天下大勢，分久必合，合久必分。周末七國分爭，并入於秦。及秦滅之後，楚漢分爭，又并入於漢。\n'
    * 40
)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the script with arguments; returns its exit code and what it said."""
    monkeypatch.setenv('LLAMA_JAX_CACHE', str(tmp_path / 'cache'))

    def call(*arguments):
        workdir = ('--workdir', str(tmp_path / 'run')) if '--workdir' not in arguments else ()
        monkeypatch.setattr(sys, 'argv', ['pretrain', *arguments, *workdir])
        with pytest.raises(SystemExit) as stop:
            cli.main(pretrain.main)
        return stop.value.code, capsys.readouterr().err

    return call


def own_text(tmp_path, name='book.txt', content=None):
    path = tmp_path / name
    path.write_bytes(PROSE.encode() if content is None else content)
    source = '--data.sources.0.'
    return [f'{source}name', 'text_files', f'{source}files', str(path)]


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (['quickstrat'], "did you mean 'quickstart'"),
        (['quickstart', '--train.seq-len', '1024'], 'raise --model.context'),
        (['quickstart', '--train.batch', '9'], '--train.batch'),
        (['quickstart', '--train.batch', '8', '--train.accumulate', '3'], '--train.accumulate'),
        (['quickstart', '--mesh.fsdp', '3'], 'device(s)'),
        (['quickstart', '--mesh.tensor', '4', '--mesh.fsdp', '2'], 'key-value heads (2)'),
        (['quickstart', '--train.steps', '10'], '--optimizer.schedule.warmup-steps'),
        (['quickstart', '--train.steps', '-5'], 'steps'),
        (['quickstart', '--checkpoint.keep', '0'], 'keep'),
        (['quickstart', '--data.sources.0.name', 'no_such_set'], 'no_such_set'),
        (['quickstart', '--data.sources.0.name', 'python_corpus/no_such_config'], 'no_such_config'),
        (['quickstart', '--data.tokenizer.path', 'missing.model'], 'missing.model'),
    ],
)
def test_one_line_and_exit_2(run, arguments, named):
    code, said = run(*arguments)
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    assert code == 2 and len(errors) == 1 and 'Traceback' not in said
    assert named in errors[0]


def test_misspelt_override_is_answered_with_the_nearest(run):
    code, said = run('quickstart', '--train.stesp', '5')
    assert code == 2 and '--train.steps' in said


@pytest.mark.parametrize(
    ('option', 'value', 'named'),
    [('--model.dropout', '2', 'model.dropout 2.0'), ('--model.kv-heads', '3', 'model.kv_heads')],
)
def test_impossible_model_is_refused_with_the_options(run, option, value, named):
    code, said = run('quickstart', option, value)
    assert code == 2 and named in said and 'Traceback' not in said


@pytest.mark.parametrize(
    ('name', 'content', 'named'),
    [
        ('empty.txt', b'', 'empty.txt'),
        ('picture.txt', b'\x89PNG\r\n\x1a\n\x00\x00\xff\xfe' * 50, 'picture.txt'),
    ],
)
def test_file_that_is_no_text(run, tmp_path, name, content, named):
    code, said = run('quickstart', *own_text(tmp_path, name, content))
    assert code == 2 and named in said and 'Traceback' not in said


def test_vocabulary_that_does_not_match(run, tmp_path):
    source = own_text(tmp_path, 'code.py', Path(argparse.__file__).read_bytes())
    code, said = run('quickstart', *source, '--data.tokenizer.vocab', '600')
    assert code == 2 and 'pass --model.vocab 600' in said


def test_tokenizer_file_that_is_no_tokenizer(run, tmp_path):
    path = tmp_path / 'prose.model'
    path.write_text(PROSE)
    code, said = run('quickstart', '--data.tokenizer.path', str(path))
    assert code == 2 and 'prose.model' in said


def test_workdir_of_another_experiment(run, tmp_path):
    from configs import get
    from llama_jax.train.experiment import to_dict

    (tmp_path / 'run').mkdir()
    other = to_dict(get('quickstart'))
    other['model']['dim'] = 512
    (tmp_path / 'run' / 'run.json').write_text(json.dumps({'experiment': other}))
    code, said = run('quickstart')
    assert code == 2 and 'model.dim: 512 -> 256' in said and 'another --workdir' in said

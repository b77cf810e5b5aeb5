"""Sources in short on the command line."""

import json
import time

import pytest

from llama_jax.data import mix
from llama_jax.data.config import Source
from llama_jax.errors import UserError


def files(*names, weight=1.0):
    return Source('text_files', weight, files=names)


def test_what_a_name_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    for prepared in ('prepared', 'versions/1.0.0'):
        (tmp_path / prepared).mkdir(parents=True)
        (tmp_path / prepared / 'dataset_info.json').write_text('{}')
    (tmp_path / 'lang=en').write_text('a')
    (tmp_path / 'plain').write_text('a')
    for item, expected in {
        'web/*.jsonl=3': files('web/*.jsonl', weight=3.0),
        'books/*.txt': files('books/*.txt'),
        'missing.jsonl.gz=.5': files('missing.jsonl.gz', weight=0.5),
        'folder=1e-1': files('folder', weight=0.1),
        'plain': files('plain'),
        'lang=en': files('lang=en'),
        'lang=en=2': files('lang=en', weight=2.0),
        '~/notes=2': files('~/notes', weight=2.0),
        'prepared=2': Source('prepared', 2.0),
        'versions': Source('versions'),
        'python_corpus/stdlib_code=2': Source('python_corpus/stdlib_code', 2.0),
        'wikipedia/20231101.en=0.25': Source('wikipedia/20231101.en', 0.25),
    }.items():
        assert mix.source(item) == expected, item


@pytest.mark.parametrize(
    'item', ['a.txt=x', 'a.txt=0', 'a.txt=-1', 'a.txt=nan', 'a.txt=inf', 'a.txt=', 'a=1e999', '=3']
)
def test_wrong_weights_are_named(item):
    with pytest.raises(UserError, match=r'--data.mix .*write NAME=NUMBER'):
        mix.source(item)


def test_the_rest_of_the_command_line_stays():
    line = ['--train.steps', '5', '--data.mix', 'a.txt=2', 'b.txt', '--model.layers=2', '--x', 'y']
    sources, others = mix.from_command_line(line)
    assert sources == (files('a.txt', weight=2.0), files('b.txt'))
    assert others == ['--train.steps', '5', '--model.layers=2', '--x', 'y']
    assert mix.from_command_line(['--data.files=a', '--data.files', 'b', 'c']) == (
        (files('a', 'b', 'c'),),
        [],
    )
    assert mix.from_command_line(['--train.steps', '5']) == ((), ['--train.steps', '5'])


def test_both_options_and_empty_ones_are_refused():
    with pytest.raises(UserError, match='give one of the two'):
        mix.from_command_line(['--data.files', 'a', '--data.mix', 'b=1'])
    with pytest.raises(UserError, match='--data.mix names nothing'):
        mix.from_command_line(['--data.mix', '--train.steps', '5'])


def test_prepare_takes_a_mix_and_prints_every_split(tmp_path, own_cache, monkeypatch, capsys):
    from experiments import prepare

    lines = ''.join(json.dumps({'body': f'text {n}'}) + '\n' for n in range(200))
    (tmp_path / 'd.jsonl').write_text(lines)
    (tmp_path / 'a.txt').write_text(' '.join(map(str, range(9000))))
    monkeypatch.setattr(
        'sys.argv',
        [
            *('prepare', 'quickstart', '--data.mix', f'{tmp_path}/d.jsonl=3', f'{tmp_path}/a.txt'),
            *('--data.sources.0.field', 'body', '--processes', '1'),
        ],
    )
    for how in (' MB/s: ', 'was there: '):
        time.sleep(0.05)  # the clock of files ticks
        prepare.main()
        out = capsys.readouterr().out.splitlines()
        first = [line.split()[0] for line in out]
        assert first[:4] == first[5:9] == ['source', 'train', 'validation', 'test']
        assert f'source 0: text_files ({tmp_path}/d.jsonl), weight 3' in out
        assert out[1].split()[2] == 'documents' and how in out[4] and str(own_cache) in out[4]
        counts = [int(line.split()[1]) for line in out[1:4]]
        assert sum(counts) == 200 and min(counts) > 0

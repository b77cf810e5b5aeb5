"""Sources in short on the command line."""

import dataclasses
import json
import re
import time

import pytest

from llama_jax.data import mix, overlap, sources
from llama_jax.data.config import DataConfig, Source, labels
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
    given, others = mix.from_command_line(line)
    assert given == {'sources': (files('a.txt', weight=2.0), files('b.txt'))}
    assert others == ['--train.steps', '5', '--model.layers=2', '--x', 'y']
    assert mix.from_command_line(['--data.files=a', '--data.files', 'b', 'c']) == (
        {'sources': (files('a', 'b', 'c'),)},
        [],
    )
    assert mix.from_command_line(['--train.steps', '5']) == ({}, ['--train.steps', '5'])


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
    asked = []

    def kept(call):
        return lambda *given, **how: asked.append(given) or call(*given, **how)

    monkeypatch.setattr(prepare.sources, 'builder', kept(prepare.sources.builder))
    monkeypatch.setattr(prepare.tokens, 'tokenised', kept(prepare.tokens.tokenised))
    for how in (' [kM]B/s: ', 'was there: '):
        time.sleep(0.05)  # the clock of files ticks
        prepare.main()
        out = capsys.readouterr().out.splitlines()
        first = [line.split()[0] for line in out]
        assert first[:4] == first[5:9] == ['source', 'train', 'validation', 'test']
        assert f'source 0: text_files ({tmp_path}/d.jsonl), weight 3' in out
        assert (
            out[1].split()[2] == 'documents' and re.search(how, out[4]) and str(own_cache) in out[4]
        )
        counts = [int(line.split()[1]) for line in out[1:4]]
        assert sum(counts) == 200 and min(counts) > 0
    # Two sources and two splits, each time; a corpus that is opened says no number.
    assert [given[-1] for given in asked if len(given) > 1] == [1] * 8


def test_no_processes_prepare_nothing(monkeypatch):
    from experiments import prepare

    monkeypatch.setattr('sys.argv', ['prepare', 'quickstart', '--processes', '0'])
    with pytest.raises(UserError, match='--processes is 0: give 1 or more'):
        prepare.main()


def test_validation_sets_have_names_and_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'lang=en').mkdir()
    given, others = mix.from_command_line(
        [
            *('--data.mix', 'a.txt=2', '--data.validate', 'zh=三国/*.txt', '中文=b.txt', 'lang=en'),
            *('c.txt', 'code=python_corpus/stdlib_code', '--data.workers', '2'),
        ]
    )
    assert given == {
        'sources': (files('a.txt', weight=2.0),),
        'validation': (
            Source('text_files', label='zh', files=('三国/*.txt',)),
            Source('text_files', label='中文', files=('b.txt',)),
            files('lang=en'),  # which is there
            files('c.txt'),
            Source('python_corpus/stdlib_code', label='code'),
        ),
    }
    assert others == ['--data.workers', '2']
    with pytest.raises(UserError, match="two sets called 'a': give each a name"):
        mix.named_sets(['a=b.txt', 'a=c.txt'], '--text')
    with pytest.raises(UserError, match="--text 'a=' names nothing; write LABEL="):
        mix.named_sets(['a='], '--text')
    with pytest.raises(UserError, match='--data.validate names nothing'):
        mix.from_command_line(['--data.validate'])


@pytest.mark.parametrize(
    ('given', 'found'),
    [
        (['a', 'b'], ['a', 'b']),
        (['a', 'a', 'a'], ['a', 'a-2', 'a-3']),
        (['a-2', 'a', 'a'], ['a-2', 'a', 'a-3']),
        (['a-b', 'a'], ['a-b', 'a']),
    ],
)
def test_no_two_labels_are_alike(given, found):
    assert labels([Source('x', label=label) for label in given]) == found


def test_files_for_validation_are_read_whole():
    held, code = files('held.txt'), Source('python_corpus/stdlib_code')
    config = DataConfig(sources=(files('a.txt'),), validation=(held, code), validation_split='test')
    assert [source.split for source in config.of('validation')] == ['all', 'test']
    assert [source.split for source in config.of('train')] == ['train']
    named = dataclasses.replace(config, validation=(dataclasses.replace(held, split='test[:9]'),))
    assert [source.split for source in named.of('validation')] == ['test[:9]']
    alone = dataclasses.replace(config, validation=())
    assert [source.split for source in alone.of('validation')] == ['test']
    heavy = dataclasses.replace(config, validation=(dataclasses.replace(code, weight=2.0),))
    with pytest.raises(UserError, match=r"weight has no effect on .*'python_corpus/stdlib_code'"):
        sources.check(heavy)


@pytest.mark.parametrize(
    ('trained', 'held', 'said'),
    [
        (files('a.txt'), files('a.txt'), True),
        (files('*.txt'), files('a.txt'), True),
        (files('a.txt'), files('link.txt'), True),
        (files('b.txt'), files('a.txt'), False),
        (files('moved/*.txt'), files('a.txt'), False),
        (files('*.txt'), dataclasses.replace(files('a.txt'), split='validation'), False),
        (files('*.txt'), dataclasses.replace(files('a.txt'), split='test+train[:5]'), True),
        (Source('wiki', split='train[:99%]'), Source('wiki', split='train[99%:]'), False),
        (Source('wiki'), Source('wiki'), False),
        (Source('wiki'), Source('wiki', split='train'), True),
        (Source('wiki'), Source('wiki', split='train', data_dir='x'), False),
    ],
    ids=str,
)
def test_held_out_text_that_is_trained_on_is_told(
    trained, held, said, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    for name in 'ab':
        (tmp_path / f'{name}.txt').write_text(name)
    (tmp_path / 'link.txt').symlink_to(tmp_path / 'a.txt')
    overlap.warn_of_overlap(DataConfig(sources=(files('b.txt'), trained), validation=(held,)))
    assert len(caplog.messages) == said
    if said:
        assert 'is trained on as well' in caplog.text and '\n' not in caplog.messages[0]

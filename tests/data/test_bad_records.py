"""Records that cannot be learnt from or are too long for a row: refused, left out or cut."""

import dataclasses
import itertools

import pytest

from llama_jax.data import loader
from llama_jax.data.config import DataConfig, Source
from llama_jax.errors import UserError
from tests.data.recording import (
    SEQ_LEN,
    Chats,
    Odd,
    Pairs,
    chat,
    files,
    load,
    pair,
    segments,
    take,
    written,
)
from tests.data.test_loader import assert_equal


def test_bad_records_are_named_together(tmp_path, caplog):
    records = [chat(i) for i in range(30)]
    records[3]['messages'].append({'role': 'user', 'content': 'and?'})
    records[7] = {'text': 'no chat'}
    records[8]['messages'][1]['content'] = ''
    path = written(tmp_path / 'c.jsonl', records)
    config = files(path)
    with pytest.raises(UserError) as refused:
        load(config, Chats())
    said = str(refused.value)
    assert '\n' not in said and said.startswith('3 of 30 records are no chats')
    assert 'c.jsonl:4: messages ends with the user' in said
    assert 'c.jsonl:8: nothing asked and answered (there: text;' in said
    assert 'c.jsonl:9: messages[1].content is empty (assistant)' in said
    dropping = dataclasses.replace(config, bad_records='drop')
    batches = take(load(dropping, Chats(), epochs=1), None)
    assert len(list(segments(batches))) == 27
    assert 'left out: 3 of 30 records' in caplog.text
    # Ten are named, those of one problem together.
    path = written(tmp_path / 'd.jsonl', [{'prompt': 'a', 'completion': 'b'}] + [{'x': 1}] * 12)
    with pytest.raises(UserError) as refused:
        load(files(path), Pairs())
    said = str(refused.value)
    assert (
        'd.jsonl:2, 3, 4, 5, 6, 7, 8, 9, 10, 11: nothing' in said
        and said.count('there: x') == 1
        and 'and 2 more' in said
    )
    written(tmp_path / 'e.jsonl', [{'source': 'cursed', 'target': 'b'}, pair(1)])
    with pytest.raises(UserError, match='e.jsonl:1: source is cursed'):
        load(files(tmp_path / 'e.jsonl'), Pairs())
    (tmp_path / 'f.jsonl').write_text('{"source": "a", "target": "b"}\n[1]\n{"source"\n')
    with pytest.raises(UserError, match=r'line 2 is no object \(list\); line 3 is no JSON'):
        load(files(tmp_path / 'f.jsonl'), Pairs())


def test_too_long_records_are_refused_dropped_or_cut(tmp_path, caplog):
    records = [chat(i, 'y' * 20) for i in range(40)]
    records[5] = chat(5, 'y' * 300)
    records[9] = chat('z' * 200, 'lost')
    path = written(tmp_path / 'c.jsonl', records)
    longest = len('z' * 200 + '?') + 1 + len('z' * 200 + ' lost') + 1
    with pytest.raises(UserError) as refused:
        load(files(path), Chats())
    assert str(refused.value) == (
        f'2 of 40 records need more than 128 positions, the longest {longest}: c.jsonl:10, 6: '
        f'raise --train.seq-len to {longest}, or set --data.too-long drop or truncate'
    )
    take(load(files(path), Chats(), seq_len=408), 1)
    dropped = take(load(files(path, too_long='drop'), Chats(), epochs=1), None)
    assert len(list(segments(dropped))) == 38
    said = f'the longest {longest}: c.jsonl:10, 6; they are left out (--data.too-long drop)'
    assert caplog.messages[0].endswith(said)
    cut = list(segments(take(load(files(path, too_long='truncate'), Chats(), epochs=1), None)))
    assert len(cut) == 39 and max(map(len, cut)) == SEQ_LEN - 1  # and an end
    assert '1 of the 2 records that are cut keep nothing to learn from' in caplog.text
    assert not any('z' in text for text in cut)
    with pytest.raises(UserError, match='no record left to learn from in rows of 8'):
        load(files(path, too_long='drop'), Chats(), seq_len=8)


@pytest.mark.parametrize('too_long', ['drop', 'truncate'])
@pytest.mark.parametrize('share', ['tokens', 'documents'])
def test_shares_and_epochs_are_of_what_is_read(tmp_path, share, too_long):
    """Of one source half is too long."""
    paths = {
        'a': written(tmp_path / 'a.jsonl', [chat('a', 'a' * (20, 400)[i % 2]) for i in range(60)]),
        'b': written(tmp_path / 'b.jsonl', [chat('b', 'b' * 20) for i in range(60)]),
    }
    sources = [Source('text_files', files=(path,), split='all') for path in paths.values()]
    config = DataConfig(sources=tuple(sources), share=share, too_long=too_long)
    with load(config, Chats()) as opened:
        batches = list(itertools.islice(opened, 200))
        told = opened.read(batches[-1]['cursor'])
    found = [text for text in segments(batches) if 'zz' not in text]
    n = {name: [len(text) for text in found if text[0] == name] for name in paths}
    read = [sum(n[name]) if share == 'tokens' else len(n[name]) for name in paths]
    assert read[0] / sum(read) == pytest.approx(0.5, abs=0.03)
    assert told['share/a'] == pytest.approx(sum(n['a']) / sum(map(sum, n.values())), abs=0.03)
    # An epoch of a source is all that is read of it.
    kept = {'a': 30 if too_long == 'drop' else 60, 'b': 60}
    for name, label in zip(paths, opened.labels, strict=True):
        assert told[f'epochs/{label}'] == pytest.approx(len(n[name]) / kept[name], rel=0.05)
    alone = dataclasses.replace(config, sources=tuple(sources[:1]))
    with load(alone, Chats()) as opened:
        n_batches = opened.batches(3)
        found = list(segments(itertools.islice(opened, n_batches)))
    assert len(found) == pytest.approx(3 * kept['a'], rel=0.1)


def test_shares_of_short_and_long_records_are_of_their_tokens(tmp_path):
    paths = [
        written(tmp_path / f'{name}.jsonl', [chat(name, name * n) for _ in range(60)])
        for name, n in (('a', 1), ('b', 50))
    ]
    sources = [Source('text_files', files=(path,), split='all') for path in paths]
    with load(DataConfig(sources=tuple(sources)), Chats()) as opened:
        batches = list(itertools.islice(opened, 200))
        told = opened.read(batches[-1]['cursor'])
    assert told['share/a'] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize('too_long', ['drop', 'truncate'])
def test_records_are_measured_once_by_whoever_opens_them_again(tmp_path, monkeypatch, too_long):
    """As each validation does."""
    path = written(tmp_path / 'c.jsonl', [chat(i, 'y' * (20, 400)[i % 2]) for i in range(20)])
    settings = {'maker': Chats(), 'epochs': 1}
    with load(files(path, too_long=too_long), **settings) as first:
        wanted = list(first)
        monkeypatch.delattr(loader, '_fitted')
        with load(files(path, too_long=too_long), **settings, of=first) as again:
            assert_equal(list(again), wanted)
    assert again.digest == first.digest


def test_one_position_too_many_is_too_many(tmp_path):
    path = written(tmp_path / 'c.jsonl', [chat(i, 'y' * 9) for i in range(5)])
    needed = len('0?') + 1 + len('0 yyyyyyyyy') + 1
    load(files(path), Chats(), seq_len=needed).close()
    with pytest.raises(UserError, match=f'5 of 5 .* than {needed - 1} .* the longest {needed}: '):
        load(files(path), Chats(), seq_len=needed - 1)


def test_records_that_give_no_example_are_told_and_left_out(tmp_path, caplog):
    path = written(tmp_path / 'c.jsonl', [chat(i, 'y' * (i + 1)) for i in range(6)])
    batches = take(load(files(path), Odd(), epochs=1), None)
    assert sorted(segments(batches)) == [f'{i}?{i} {"y" * (i + 1)}' for i in (1, 3, 5)]
    assert '3 of 6 records give no example for Odd and are left out: c.jsonl:1, 3, 5' in caplog.text


def test_of_two_streams_the_one_that_is_too_short_is_named(tmp_path):
    path = written(tmp_path / 'p.jsonl', [pair(0), {'source': 'a', 'target': 'b' * 200}])
    with pytest.raises(UserError, match=r'1 of 2 .* 64 positions, the longest 200: p.jsonl:2: ra'):
        load(files(path), Pairs())
    path = written(tmp_path / 'q.jsonl', [pair(0), {'source': 'b' * 200, 'target': 'a'}])
    with pytest.raises(UserError, match=r'64 positions of encoder, .* --train.seq-len to 400,'):
        load(files(path), Pairs())

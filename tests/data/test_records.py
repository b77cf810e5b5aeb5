"""Records from files to rows: whole, in the order of any number of hosts, each once an epoch."""

import collections
import dataclasses
import gzip
import itertools
import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llama_jax.data import python_corpus, tokens
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.loader import _Rows
from llama_jax.data.record import Chat, Labelled, Pair
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import TokenizerConfig
from tests.data.corpus import CHINESE
from tests.data.objective import Causal
from tests.data.recording import (
    BATCH,
    SEQ_LEN,
    TOKENIZER,
    Chats,
    Pairs,
    Uneven,
    chat,
    files,
    load,
    pair,
    segments,
    take,
    written,
)
from tests.data.test_loader import assert_equal, joined


@pytest.fixture(scope='module')
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp('chats')
    return written(path / 'chats.jsonl', [chat(i) for i in range(150)] + [chat(150, CHINESE[0])])


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return written(tmp_path_factory.mktemp('pairs') / 'p.jsonl', [pair(i) for i in range(200)])


def test_every_record_comes_once_and_whole(chats):
    batches = take(load(files(chats), Chats(), epochs=1), None)
    found = collections.Counter(segments(batches))
    with open(chats, encoding='utf-8') as lines:
        messages = [json.loads(line)['messages'] for line in lines]
    assert found == collections.Counter(a['content'] + b['content'] for a, b in messages)
    for batch in batches:
        weights, targets = batch['weights'], batch['targets']
        assert np.all(weights[batch['segments'] == 0] == 0)
        # The answer with its end, and nothing of the question.
        assert weights.sum() == sum(
            len(answer['content'].encode()) + 1
            for question, answer in messages
            if question['content'] + answer['content'] in {*segments([batch])}
        )
        assert targets.shape == (BATCH, SEQ_LEN)
    used = np.mean([np.mean(batch['segments'] > 0) for batch in batches[:-1]])
    assert used > 0.93


def test_two_streams_hold_the_same_records(pairs):
    batches = take(load(files(pairs), Pairs(), epochs=1), None)
    sources, targets = (list(segments(batches, key)) for key in ('encoder/inputs', 'targets'))
    assert len(sources) == 200 == len({*sources})
    assert [x.rstrip('s') for x in sources] == [x.rstrip('t') for x in targets]
    # The streams are in one proportion, so one of them fills.
    used = [np.mean(b['encoder/segments'] > 0) for b in batches[:-1]]
    assert np.mean(used) > 0.9


@pytest.mark.parametrize('hosts', [2, 4])
def test_batches_do_not_depend_on_hosts_and_resume_anywhere(chats, tmp_path, hosts):
    other = written(tmp_path / 'b.jsonl', [chat(i, 'b') for i in range(10)])
    config = DataConfig(
        sources=(
            Source('text_files', files=(chats,), split='all', weight=2),
            Source('records', files=(other,), split='all'),
        )
    )
    expected = take(load(config, Chats()), 30)
    for done in (0, 7, 29):
        cursor = expected[done - 1]['cursor'] if done else None
        each = BATCH // hosts
        parts = [
            take(
                load(config, Chats(), rows=range(h * each, (h + 1) * each), cursor=cursor),
                30 - done,
            )
            for h in range(hosts)
        ]
        assert_equal(joined(parts), expected[done:])


def test_what_makes_rows_travels_to_worker_processes(chats):
    given = (np.arange(151, dtype=np.float32)[:, None],)
    with load(files(chats), Chats(), given=given) as loader:
        recipe, begin = pickle.loads(pickle.dumps((loader._recipe, loader._plan.beginning())))
        rows = _Rows(recipe, [0, 1, 2, 3], begin)
        assert_equal(list(itertools.islice(rows, 6)), list(itertools.islice(loader, 6)))


def test_columns_that_are_given_come_with_their_records(chats):
    given = (np.arange(151, dtype=np.float32)[:, None],)
    loader = load(files(chats), Chats(), given=given, epochs=1)
    texts = {text: i for i in range(151) for text in [TOKENIZER.decode(loader.texts[0][i])]}
    seen = set()
    for batch in take(loader, None):
        for row, numbers, values in zip(
            batch['targets'], batch['segments'], batch['given'], strict=True
        ):
            for number in range(1, numbers.max() + 1):
                here = numbers == number
                assert {*values[here]} == {texts[TOKENIZER.decode(row[here])]}
                seen |= {*values[here]}
    assert len(seen) == 151


def test_records_in_order_tell_their_numbers(chats, monkeypatch):
    monkeypatch.setattr('llama_jax.data.loader._WINDOW', 40)
    whole = load(files(chats), Chats())
    parts = [load(files(chats), Chats(), rows=rows) for rows in ([0, 2], [1, 3])]
    found = []
    with whole, parts[0], parts[1]:
        texts = [TOKENIZER.decode(whole.texts[0][i]) for i in range(151)]
        halves = zip(*(part.in_order(0) for part in parts), strict=True)
        for (batch, blocks), ((one, first), (other, second)) in zip(
            whole.in_order(0), halves, strict=True
        ):
            numbers = [[block.document for block in row] for row in blocks]
            assert list(segments([batch])) == [texts[i] for row in numbers for i in row]
            assert blocks == [first[0], second[0], first[1], second[1]]
            np.testing.assert_array_equal(batch['inputs'][[0, 2]], one['inputs'])
            np.testing.assert_array_equal(batch['inputs'][[1, 3]], other['inputs'])
            found += [i for row in numbers for i in row]
    assert sorted(found) == list(range(151))


def test_files_of_any_kind_hold_the_same_records(tmp_path, pairs):
    with open(pairs, encoding='utf-8') as lines:
        records = [json.loads(line) for line in lines]
    (tmp_path / 'a.json').write_text(json.dumps(records))
    with gzip.open(tmp_path / 'a.jsonl.gz', 'wt') as file:
        file.writelines(json.dumps(record) + '\n' for record in records)
    wanted = collections.Counter(segments(take(load(files(pairs), Pairs(), epochs=1), None)))
    for name in ('a.json', 'a.jsonl.gz'):
        batches = take(load(files(tmp_path / name), Pairs(), epochs=1), None)
        assert collections.Counter(segments(batches)) == wanted


def test_fewer_records_than_fill_a_batch_are_told(tmp_path, caplog):
    path = written(tmp_path / 'c.jsonl', [chat(i) for i in range(3)])
    batch = take(load(files(path), Chats()), 1)[0]
    assert 'the 3 records of training fill less than a batch of 4 x 128' in caplog.text
    assert np.all(batch['segments'].max(1) > 0)


def test_what_an_objective_does_not_read_is_refused_by_name(chats, tmp_path):
    (tmp_path / 'a.txt').write_text('text')
    with pytest.raises(UserError, match=r'a.txt. holds no records: give .jsonl'):
        load(files(tmp_path / 'a.txt'), Chats())
    records = DataConfig(sources=(Source('records', files=(chats,)),))
    with pytest.raises(UserError, match=r"'records' .* the objective reads texts: name it text_"):
        load(records, Causal())
    for setting, value in (('too_long', 'drop'), ('bad_records', 'drop'), ('chat', 'chatml')):
        with pytest.raises(UserError, match=f'--data.{setting.replace("_", "-")} has no effect'):
            load(files(chats, **{setting: value}), Causal())
    for setting, maker in (('field', Chats()), ('rename', Causal())):
        value = 'body' if setting == 'field' else ('a=b',)
        source = Source('text_files', files=(chats,), **{setting: value})
        with pytest.raises(UserError, match=f'--data.sources.0.{setting} has no effect'):
            load(DataConfig(sources=(source,)), maker)


def test_fields_by_other_names(tmp_path):
    path = written(tmp_path / 'p.jsonl', [{'en': f'{i} a', 'zh': f'{i} 好'} for i in range(5)])
    source = Source('records', files=(path,), split='all', rename=('source=en', 'target=zh'))
    batches = take(load(DataConfig(sources=(source,)), Pairs(), epochs=1), None)
    assert sorted(segments(batches)) == [f'{i} 好' for i in range(5)]
    source = dataclasses.replace(source, rename=('source',))
    with pytest.raises(UserError, match="rename 'source' of 'records' is no NAME=FIELD"):
        load(DataConfig(sources=(source,)), Pairs())


class Dialogues(tfds.core.GeneratorBasedBuilder):
    """A data set of tensorflow-datasets with messages and classes."""

    code_path = python_corpus.PythonCorpus.code_path
    VERSION = tfds.core.Version('1.0.0')
    ROWS = (('hi', 'yes', 1), ('你好', 'no', 0), ('?', '', -1))

    def _info(self):
        message = {'role': tfds.features.Text(), 'content': tfds.features.Text()}
        features = {
            'messages': tfds.features.Sequence(message),
            'numbers': tfds.features.Sequence(np.int32),
            'label': tfds.features.ClassLabel(names=['good', 'bad']),
            'text': tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for number, (asked, answer, label) in enumerate(self.ROWS):
            said = [('user', asked), ('assistant', answer)]
            messages = [{'role': role, 'content': text} for role, text in said]
            yield number, dict(messages=messages, numbers=[1, 2], label=label, text=asked)


def test_a_stored_data_set_yields_records(tmp_path, own_cache):
    Dialogues(data_dir=str(tmp_path), file_format='array_record').download_and_prepare()
    source = Source('dialogues', data_dir=str(tmp_path))
    (held,) = open_sources(DataConfig(sources=(source,)), 'train', Chat).sources
    fields = {x['text']: x for x in map(held.fields, range(3))}
    assert fields['hi']['label'] == 'bad' and fields['?']['label'] is None
    assert fields['hi']['numbers'] == [1, 2]
    assert {held.record(i, Labelled).label for i in range(3) if held.fields(i)['label']} == {
        *('good', 'bad')
    }
    with pytest.raises(UserError, match=r'1 of 3 .*: record \d: messages\[1\].content is empty'):
        load(DataConfig(sources=(source,)), Chats())
    dropping = DataConfig(sources=(source,), bad_records='drop')
    assert sorted(segments(take(load(dropping, Chats(), epochs=1), None))) == ['hiyes', '你好no']
    renamed = dataclasses.replace(source, rename=('source=text', 'target=label'))
    dropping = dataclasses.replace(dropping, sources=(renamed,))
    assert sorted(segments(take(load(dropping, Pairs(), epochs=1), None))) == ['bad', 'good']


def test_a_tokenizer_is_learnt_from_what_records_say(chats):
    config = files(chats, tokenizer=TokenizerConfig(vocab=560))
    tokenizer = load_tokenizer(config, Chat)
    text = 'x' * 40
    assert len(tokenizer.encode(text)) < 10
    assert load_tokenizer(config, Chat).digest == tokenizer.digest


def test_of_a_directory_a_readme_is_left_out(tmp_path, caplog):
    (tmp_path / 'd').mkdir()
    written(tmp_path / 'd' / 'a.jsonl', [pair(1)])
    (tmp_path / 'd' / 'README.md').write_text('# Data')
    assert len(list(segments(take(load(files(tmp_path / 'd'), Pairs(), epochs=1), None)))) == 1
    assert '1 files hold no records and are left out, such as README.md' in caplog.text
    (tmp_path / 'd' / 'a.jsonl').unlink()
    with pytest.raises(UserError, match='README.md. holds no records'):
        load(files(tmp_path / 'd'), Pairs())


def test_encodings_are_kept_by_what_they_depend_on(pairs):
    def directory(maker, **settings):
        with load(files(pairs), maker, **settings) as loader:
            return loader.texts[0].directory

    first = directory(Pairs())
    before = (first / 'tokens.json').stat().st_mtime_ns
    assert directory(Pairs(), chat='other', seq_len=256) != first  # chats are written otherwise
    assert directory(Pairs(), seq_len=256) == first
    assert directory(Pairs(lowered=True)) != first
    assert (first / 'tokens.json').stat().st_mtime_ns == before


def test_what_is_kept_is_what_the_objective_encodes(tmp_path, own_cache, monkeypatch):
    """In several files, of which one holds nothing but bad records."""
    monkeypatch.setattr(tokens, '_PART_BYTES', 200)
    records = [{'source': f'cursed {"x" * 200}', 'target': 'a'}] * 3 + [pair(i) for i in range(30)]
    path = written(tmp_path / 'p.jsonl', records)
    config = files(path, bad_records='drop', too_long='drop')
    with load(config, Pairs()) as loader:
        (kept,) = loader.texts
        held = loader.documents[0]
    assert len(kept.parts) > 5 and kept.bad == 3 and sorted(kept.problems()) == [0, 1, 2]
    loss_tokens = 0
    for i in range(len(records)):
        found = kept.encoded(i)
        if i < 3:
            assert not sum(map(len, found.parts))
            continue
        wanted = Pairs().encoded(held.record(i, Pair), vocabulary=TOKENIZER, chat=None)
        for name in ('parts', 'weights'):
            for one, other in zip(getattr(found, name), getattr(wanted, name), strict=True):
                np.testing.assert_array_equal(one, other)
        loss_tokens += sum(map(len, wanted.parts))
    assert kept.loss_tokens == kept.tokens == loss_tokens


def test_records_of_fewer_parts_end_in_empty_ones(tmp_path, own_cache):
    records = [{'source': name, 'target': 'b'} for name in ('odd', 'even', 'even so')]
    config = files(written(tmp_path / 'p.jsonl', records))
    with load(config, Uneven()) as loader:
        (kept,) = loader.texts
        held = loader.documents[0]
    assert sorted(map(tuple, kept.lengths.tolist())) == [(3, 0), (4, 1), (7, 1)]
    for i in range(3):
        found = kept.encoded(i)
        wanted = Uneven().encoded(held.record(i, Pair), vocabulary=TOKENIZER, chat=None)
        assert len(found.parts) == 2
        for one, other in zip(found.parts, wanted.parts, strict=False):
            np.testing.assert_array_equal(one, other)
        kept.check(i)  # it is whole


@pytest.mark.parametrize('name', ['00000.weights', '00000.tokens', 'lengths', 'numbers'])
def test_damage_is_told_by_the_batch_that_reads_it(tmp_path, own_cache, name):
    path = written(tmp_path / 'c.jsonl', [chat(i) for i in range(5)])
    with load(files(path), Chats()) as loader:
        path = loader.texts[0].directory / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f'{path.parent}.* is damaged'):
        take(load(files(tmp_path / 'c.jsonl'), Chats(), epochs=1), None)

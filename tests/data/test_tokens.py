import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from llama_jax.data import tokens, write
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from tests.data.corpus import CHINESE

TEXTS = [*CHINESE, 'def f():\n    return 1\n' * 20, CHINESE[0], '🙂']


@pytest.fixture
def corpus(jsonl, own_cache):
    path = jsonl(TEXTS)
    source = Source('text_files', files=(str(path),), split='all')
    return open_sources(DataConfig(sources=(source,)), 'train')


@pytest.fixture
def several(monkeypatch):
    """Parts of a few documents."""
    monkeypatch.setattr(tokens, '_PART_BYTES', 200)


def test_tokens_are_those_of_the_tokenizer(corpus, tokenizer, several):
    (texts,) = tokens.tokenised(corpus, tokenizer)
    (documents,) = corpus.sources
    assert len(texts) == len(documents) > 4 and len(texts.parts) > 3
    wanted = [tokenizer.encode(text) for text in documents]
    for travelled in (texts, pickle.loads(pickle.dumps(texts))):
        for i, ids in enumerate(wanted):
            np.testing.assert_array_equal(travelled[i], ids)
            assert travelled.length(i) == len(ids)
    assert texts.tokens == sum(map(len, wanted))
    assert texts.bytes == sum(len(text.encode()) for text in documents)
    with pytest.raises(IndexError):
        texts[len(texts)]


def test_few_files_are_open_at_once(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, '_PART_BYTES', 1)
    monkeypatch.setattr(tokens, '_MOST_OPEN', 2)
    (texts,) = tokens.tokenised(corpus, tokenizer)
    assert len(texts.parts) - 1 == len(texts) > 4
    texts[0], texts.identity(0)
    open_files = Path('/proc/self/fd')
    before = len([*open_files.iterdir()])
    for i, text in enumerate(corpus.sources[0]):
        np.testing.assert_array_equal(texts[i], tokenizer.encode(text))
    assert len([*open_files.iterdir()]) <= before + 2


def test_every_field_has_tokens_of_its_own(tmp_path, own_cache):
    name = write.shard_name('pairs', 'train', 0, 1)
    writer = write.ShardWriter(tmp_path / name)
    writer.write(write.example({'text': b'one', 'body': CHINESE[0].encode()}))
    writer.close()
    write.write_description(
        tmp_path,
        name='pairs',
        config='two',
        version='1.0.0',
        description='Two texts in a record.',
        texts=('text', 'body'),
        splits={'train': [write.Shard(name, writer.records, writer.bytes)]},
    )
    reading = bytes_tokenizer()
    for field, wanted in (('text', 'one'), ('body', CHINESE[0])):
        config = DataConfig(sources=(Source(str(tmp_path), field=field),))
        (texts,) = tokens.tokenised(open_sources(config, 'train'), reading)
        assert reading.decode(texts[0]) == wanted
    for split in ('train[:x', 'train[5:]', 'train[3:1'):
        config = DataConfig(sources=(Source(str(tmp_path), split=split),))
        with pytest.raises(UserError, match='has no (split|documents)') as refused:
            open_sources(config, 'train')
        assert '\n' not in str(refused.value)


def test_equal_documents_share_an_identity(corpus, tokenizer):
    (texts,) = tokens.tokenised(corpus, tokenizer)
    by_text = {}
    for i, text in enumerate(corpus.sources[0]):
        by_text.setdefault(text, set()).add(texts.identity(i))
    assert all(len(found) == 1 for found in by_text.values())
    assert len(set.union(*by_text.values())) == len(by_text) < len(texts)


def test_types_are_as_narrow_as_the_vocabulary(corpus, tokenizer, monkeypatch):
    (texts,) = tokens.tokenised(corpus, tokenizer)
    assert texts[0].dtype == np.uint16
    wide = bytes_tokenizer()
    wide.vocab_size = 2**16 + 1
    (texts,) = tokens.tokenised(corpus, wide)
    assert texts[0].dtype == np.int32


def test_a_tokenizer_of_its_own_has_a_cache_of_its_own(corpus, tokenizer):
    (one,), (other,) = (tokens.tokenised(corpus, t) for t in (tokenizer, bytes_tokenizer()))
    assert one.digest != other.digest and one.directory != other.directory
    again = tokens.tokenised(corpus, tokenizer)
    assert again == (one,)


def test_what_is_finished_is_not_made_again(corpus, tokenizer, several, monkeypatch):
    encode = type(tokenizer).encode
    seen = []

    def killed(self, text, **settings):
        seen.append(text)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return encode(self, text, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), 'encode', killed)
        with pytest.raises(KeyboardInterrupt):
            tokens.tokenised(corpus, tokenizer)
        first, seen[3:] = seen[:3], [None] * 5  # killed no more
        (texts,) = tokens.tokenised(corpus, tokenizer)
    (documents,) = corpus.sources
    assert len(seen) - 8 < len(documents)
    for i, text in enumerate(documents):
        np.testing.assert_array_equal(texts[i], tokenizer.encode(text))
    left = {path.name.rpartition('.')[2] for path in texts.directory.iterdir()}
    assert left == {'tokens', 'json', 'offsets', 'identities'} and first


@pytest.mark.parametrize('name', ['offsets', 'identities', '00000.tokens', 'tokens.json'])
def test_damage_is_named_and_the_remedy_works(corpus, tokenizer, name):
    (texts,) = tokens.tokenised(corpus, tokenizer)
    path = texts.directory / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match='is damaged') as refused:
        (texts,) = tokens.tokenised(corpus, tokenizer)
        texts.identity(0)
        texts[0]
    directory = Path(str(refused.value).partition('delete ')[2].partition(';')[0])
    assert directory == texts.directory and str(path) in str(refused.value)
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    (texts,) = tokens.tokenised(corpus, tokenizer)
    assert texts[0].size and json.loads((directory / 'tokens.json').read_text())

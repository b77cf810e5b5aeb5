"""The tokenizer of a configuration, and the sample that it is learnt from."""

import dataclasses
import itertools
import json
import tracemalloc

import numpy as np
import pytest

from llama_jax.data import load_tokenizer as loading
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.load_tokenizer import PIECE, check, load_tokenizer, sample
from llama_jax.data.sources import Corpus
from llama_jax.data.train_tokenizer import SMALLEST
from llama_jax.errors import UserError
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import CONTROL_NAMES, TokenizerConfig
from tests.convert import written


@dataclasses.dataclass
class Texts:
    """Documents of a source: what `sample` reads of one."""

    texts: list

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.texts[index]


def corpus(*sources, weights=None):
    return Corpus(tuple(Texts(texts) for texts in sources), weights or (1.0,) * len(sources))


def test_bytes_are_shared_by_weight_whatever_the_length_of_documents():
    short, long = ['s' * 60] * 20_000, ['l' * 6000] * 2000
    for weights in ((1.0, 1.0), (3.0, 1.0)):
        text = ''.join(sample(corpus(short, long, weights=weights), 400_000))
        assert len(text) == 400_000
        share = weights[0] / sum(weights)
        assert text.count('s') / len(text) == pytest.approx(share, abs=0.02)


def test_a_source_that_is_exhausted_leaves_its_share_to_the_others():
    text = ''.join(sample(corpus(['a' * 100], ['b' * 100] * 50), 3000))
    assert text.count('a') == 100 and text.count('b') == 2900
    assert ''.join(sample(corpus(['a' * 100], ['b' * 50]), 3000)).count('b') == 50


def test_every_piece_of_a_document_comes_once():
    document = ''.join(map(chr, range(0x4E00, 0x4E00 + 5))) * (PIECE * 3) + 'end'
    texts = [document, 'short', 'x' * (PIECE + 1), '']
    pieces = list(sample(corpus(texts), 10**9))
    assert sum(map(len, pieces)) == sum(map(len, texts))
    assert sorted(''.join(pieces)) == sorted(''.join(texts))


def test_a_long_document_counts_by_pieces():
    texts = ['x' * (PIECE * 400), *['y' * PIECE] * 400]
    text = ''.join(sample(corpus(texts), 100 * PIECE))
    assert text.count('x') < 5 * PIECE
    alone = ''.join(sample(corpus(texts[:1]), 100 * PIECE))
    assert len(alone) == 100 * PIECE


def test_a_long_document_is_read_a_few_times():
    read = []

    class Counted(Texts):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    texts = Counted(['x' * (PIECE * 500), *['y'] * 999])
    total = sum(map(len, sample(Corpus((texts,), (1.0,)), 10**9)))
    assert total == PIECE * 500 + 999
    assert read.count(0) <= 10


def test_the_sample_is_random_cut_at_characters_and_reproducible():
    texts = [f'{i:06d}' for i in range(5000)]
    first, second = (list(sample(corpus(texts), 6000)) for _ in range(2))
    assert first == second and len(set(first)) == 1000
    assert np.std([int(text) for text in first]) > 1200  # 1443 over all of them
    assert ''.join(sample(corpus(['的' * 100]), 100)) == '的' * 33
    twice = list(sample(corpus(texts, texts), 12_000))
    assert twice[::2] != twice[1::2]  # equal sources do not march in step


def test_the_sample_takes_no_memory_for_documents_that_it_does_not_read():
    class Endless(Texts):
        def __len__(self):
            return 400_000_000

        def __getitem__(self, index):
            return 'z' * 100

    tracemalloc.start()
    list(itertools.islice(sample(Corpus((Endless([]),) * 2, (1.0, 1.0)), 10**6), 500))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_bytes_need_no_corpus():
    nowhere = DataConfig(sources=(), tokenizer=TokenizerConfig(kind='bytes'))
    assert load_tokenizer(nowhere).digest == bytes_tokenizer().digest


@pytest.fixture
def path(tokenizer, tmp_path):
    tokenizer.save(tmp_path / 'given.model')
    return str(tmp_path / 'given.model')


def test_what_cannot_be_is_told_without_a_corpus(tmp_path, path, monkeypatch):
    monkeypatch.setattr(loading, 'open_sources', lambda *_: 1 / 0)
    junk = tmp_path / 'junk.model'
    junk.write_text('<html>')
    bad = (
        (TokenizerConfig(vocab=SMALLEST - 1), 0, f'set {SMALLEST} or more, or .*kind bytes'),
        (TokenizerConfig(sample_bytes=0), 0, 'sample_bytes is 0'),
        (TokenizerConfig(path=str(tmp_path / 'no.model')), 0, 'cannot read the tokenizer'),
        (TokenizerConfig(path=str(junk)), 0, 'junk.model is a web page'),
        (TokenizerConfig(path='gs://bucket/t.model'), 0, 'no path of this machine'),
        (TokenizerConfig(path=path, kind='bytes'), 0, 'leave one of them out'),
        (TokenizerConfig(path=path), 1023, 'model.vocab 1024, or 0'),
        (TokenizerConfig(kind='bytes'), 256, 'model.vocab 399, or 0'),
        (TokenizerConfig(vocab=4096), 2048, 'model.vocab 4096, or 0'),
    )
    for recipe, rows, message in bad:
        with pytest.raises(UserError, match=message) as caught:
            check(recipe, rows=rows)
        assert '\n' not in str(caught.value)
        if not rows:
            config = DataConfig(sources=(Source('nowhere'),), tokenizer=recipe)
            with pytest.raises(UserError, match=message):
                load_tokenizer(config)
    for recipe in (TokenizerConfig(path=path), TokenizerConfig(vocab=1024)):
        for rows in (0, 1024, 2048):
            check(recipe, rows=rows)


def test_a_tokenizer_that_loses_text_is_told_of_once(tmp_path, caplog):
    content = json.loads(written.trained().to_str())
    content['normalizer'] = {'type': 'Lowercase'}
    path = tmp_path / 'lower.json'
    path.write_text(json.dumps(content))
    config = DataConfig(tokenizer=TokenizerConfig(path=str(path)))
    lossy = load_tokenizer(config)
    assert load_tokenizer(config).decode(lossy.encode('Ab Ü')) == 'ab ü' and not lossy.lossless
    (record,) = caplog.records
    assert f'{path} loses text: characters are changed (Lowercase)' in record.message
    assert set(CONTROL_NAMES) <= set(lossy.control)

"""Baselines by hand, and against what anything above chance must find."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax.evaluate import baselines, examples, words
from llama_jax.evaluate.baselines import NGram
from llama_jax.evaluate.choosing import Asked
from llama_jax.evaluate.examples import Chunk, Labelled, Pairs
from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.texts import NO_PAIRS, Texts
from llama_jax.objectives.asked import Middle

VOCAB = 40


class Letters:
    """Token i is the i-th of these words, behind a blank."""

    vocab_size = VOCAB
    words = ['alpha', 'beta', 'gamma', 'return', *(f'w{i:02}' for i in range(VOCAB - 4))]
    byte_lengths = np.array([len(word) + 1 for word in words])
    dummy_prefix = False

    def decode(self, ids):
        return ''.join(f' {self.words[i]}' for i in ids)


def ids(*tokens):
    return np.array(tokens, np.int32)


def labelled(rng, *, by_words):
    """Two classes, told apart by their words or by nothing that a count can see."""

    def chunk(label):
        low = 10 * label if by_words else 0
        tokens = rng.integers(low, low + 10, 12)
        return Chunk(tokens if by_words or label else np.sort(tokens), label, 'g')

    return Labelled(('a', 'b'), *([chunk(i % 2) for i in range(n)] for n in (60, 4, 30)))


@pytest.fixture(scope='module')
def found():
    rng = np.random.default_rng(0)
    a = [rng.integers(VOCAB, size=20) for _ in range(30)]
    b = [np.concatenate([x[:12], rng.integers(VOCAB, size=8)]) for x in a]
    document = np.repeat(np.arange(15), 2).astype(str)
    pairs = Pairs(a, b, document, document)
    windows = [rng.integers(VOCAB, size=16) for _ in range(5)]
    middles = [Middle(x[:6], x[6:10], x[10:]) for x in windows]
    infills = [
        Middle(ids(3, 1, 9), ids(1), ids(3, 3, 1, 8)),  # beta; return is a keyword
        Middle(ids(0, 2), ids(0), ids(2, 2)),  # alpha, where gamma is more frequent
    ]
    return Texts(
        topics=labelled(rng, by_words=True),
        order=labelled(rng, by_words=False),
        spans=pairs,
        pairs=NO_PAIRS,
        whitening=[],
        begun=windows,
        windows=windows,
        middles=middles,
        infills=infills,
        tasks={'star_graph': Asked([], np.arange(0), np.arange(0), ['a', 'b'], ['a', 'b'], False)},
        document={},
        absent={},
        about={'infills': 'names'},
    )


def test_the_most_frequent_name_is_one_that_can_be_asked_for():
    code = 'self.size = self.end - self.start; return size'
    assert examples.candidates(code) == {'size': 2, 'end': 1, 'start': 1}
    assert words.candidates('the cat and the dog, or a cat') == {
        'the': 2,
        'cat': 2,
        'and': 1,
        'dog': 1,
    }
    assert words.candidates('我们爱我们').most_common(1) == [('我们', 2)]


def test_rows(found):
    repeated = [np.concatenate([window] * 3) for window in found.windows]
    rows = baselines.counts(found, Letters(), repeated)
    assert list(rows) == ['TF-IDF', 'bag of tokens', '3-gram', 'most frequent name', 'chance']
    for row in rows.values():
        assert set(row) <= set(METRICS)
    value = {(name, metric): row[metric]['value'] for name, row in rows.items() for metric in row}
    for name in ('TF-IDF', 'bag of tokens'):
        # Words tell topics apart, and nothing of the order of words.
        assert value[name, 'topics_accuracy'] == 1
        assert 0.2 < value[name, 'probe_accuracy'] < 0.8
        assert value[name, 'recall_span_1'] > 0.6
        assert value[name, 'recall_span_white_1'] == value[name, 'recall_span_1']
    assert value['chance', 'topics_accuracy'] == 0.5
    # Each looks among itself and the 28 of other documents.
    assert value['chance', 'recall_span_5'] == pytest.approx(5 / 29)
    assert rows['chance']['task_star_graph'] == {'value': 1 / 3, 'n': 2}
    assert value['most frequent name', 'infill_exact'] == 0.5
    uniform = sum(4 * math.log2(VOCAB) for _ in found.middles)
    n_bytes = sum(Letters.byte_lengths[text.middle].sum() for text in found.middles)
    assert value['chance', 'middle_bits_per_byte'] == pytest.approx(uniform / n_bytes)
    # It has read these very texts.
    for metric in ('bits_per_byte', 'suffix_bits_per_byte', 'middle_bits_per_byte'):
        assert value['3-gram', metric] < 0.5 * value['chance', metric]
    assert 'recall_doc_1' not in rows['TF-IDF'] and 'infill_exact' not in rows['3-gram']


def test_a_long_run_is_counted_from_its_beginning(found, monkeypatch):
    monkeypatch.setattr(baselines, 'MOST', 25)
    read = []

    def training():
        for window in found.windows:
            read.append(window)
            yield window

    rows = baselines.counts(found, Letters(), training())
    assert '3-gram of 25 tokens' in rows and len(read) == -(-25 // len(read[0]))
    first = baselines.NGram([np.concatenate(found.windows)[:25]], vocab=VOCAB)
    some = found.middles[0]
    few = baselines.NGram(baselines._first(iter(found.windows), 25), vocab=VOCAB)
    assert few.tokens == first.tokens == 25
    assert few.log_p(some.prefix, some.middle) > -1000


def test_ngram_by_hand():
    # Of 0 1 2 and 0 1 3: two kinds in two behind (0, 1) and (1,), and 0 0 1 1 2 3 at large.
    model = NGram([ids(0, 1, 2), ids(0, 1, 3)], vocab=10)
    base = 1 / 10
    one = (1 + 4 * base) / (6 + 4)
    two = (1 + 2 * one) / (2 + 2)
    three = (1 + 2 * two) / (2 + 2)
    assert model.log_p(ids(0, 1), ids(2)) == pytest.approx(math.log(three))
    # A token that was never seen, behind a history that was: what is left for it.
    unseen = 2 / 4 * (2 / 4 * (4 / 10 * base))
    assert model.log_p(ids(0, 1), ids(9)) == pytest.approx(math.log(unseen))
    assert model.log_p(ids(), ids(9)) == pytest.approx(math.log(4 / 10 * base))


def test_ngram_is_a_distribution():
    rng = np.random.default_rng(1)
    model = NGram([rng.integers(8, size=50) for _ in range(3)], vocab=8)
    for history in itertools.product(range(8), repeat=2):
        p = [math.exp(model.log_p(ids(*history), ids(w))) for w in range(8)]
        assert sum(p) == pytest.approx(1)


def test_texts_that_a_corpus_has_not_are_left_out(found):
    none = Labelled((), [], [], [])
    bare = found._replace(topics=none, order=none, infills=[], begun=[])
    rows = baselines.counts(bare, SimpleNamespace(**vars(Letters) | {'decode': str}), [])
    assert rows['most frequent name'] == {}
    assert set(rows['TF-IDF']) == {
        f'recall_span{w}_{k}' for w in ('', '_white') for k in (1, 5, 10)
    }
    assert 'bits_per_byte' not in rows['3-gram'] and 'suffix_bits_per_byte' in rows['3-gram']

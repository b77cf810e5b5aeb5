"""The texts that arms are measured on: apart where they must be, the same for all."""

import numpy as np
import pytest

from llama_jax.evaluate import examples


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text):
        return np.array([ord(c) for c in text], np.int32)

    def decode(self, ids):
        return ''.join(chr(i) for i in ids)


def record(package, module, text='', docstring='', body=''):
    return dict(text=text, module=module, package=package, docstring=docstring, body=body)


@pytest.fixture
def records():
    """Package p has 4 + p modules; a line names its module."""
    return [
        record(f'p{p}', f'p{p}.m{m}', f'p{p}.m{m} is this\n' * (5 + 20 * m))
        for p in range(5)
        for m in range(2 + p)
    ]


def test_no_module_is_in_two_parts(records):
    found = examples.topics(records, Letters(), n_topics=2, per_topic=40, length=8, seed=0)
    assert found.names == ('p3', 'p4')  # those of most modules
    modules = [{chunk.module for chunk in part} for part in found[1:]]
    assert all(modules)
    assert not (modules[0] & modules[1] or modules[0] & modules[2] or modules[1] & modules[2])
    for part, most in zip(found[1:], (24, 6, 10), strict=True):
        for label in (0, 1):
            chunks = [chunk for chunk in part if chunk.label == label]
            assert 0 < len(chunks) <= most
            assert all(chunk.module.startswith(found.names[label] + '.') for chunk in chunks)
            assert all(len(chunk.tokens) == 8 for chunk in chunks)


def test_packages_of_few_modules_are_no_topics(records):
    found = examples.topics(records, Letters(), n_topics=9, per_topic=40, length=8, seed=0)
    assert found.names == ('p2', 'p3', 'p4')


def test_choice_follows_the_seed_alone(records):
    def choice(records, seed):
        return examples.digest(
            examples.topics(records, Letters(), n_topics=2, per_topic=9, length=8, seed=seed)
        )

    assert choice(records, 1) == choice(records[::-1], 1)
    assert choice(records, 1) != choice(records, 2)


def test_digest_tells_shapes_and_values_apart():
    x = np.arange(4, dtype=np.int32)
    seen = [x, x + 1, [x], [x[:2], x[2:]], [x, x], (1, 'a'), (1, 'b')]
    assert len({examples.digest(value) for value in seen}) == len(seen)
    assert examples.digest([x, (x, 1)]) == examples.digest((x.astype(np.int64), [x, 1]))


def test_spans_of_a_pair_do_not_overlap():
    documents = [np.arange(1000 * i, 1000 * i + n) for i, n in enumerate((300, 40, 15, 900))]
    found = examples.span_pairs(documents, n=12, length=16, seed=0)
    assert len(found.a) == len(found.b) == 12
    assert set(found.document.tolist()) == {0, 1, 3}  # 15 tokens are too few
    for a, b, document in zip(found.a, found.b, found.document, strict=True):
        assert set(a.tolist()) | set(b.tolist()) <= set(documents[document].tolist())
        assert a[-1] < b[0] and b[-1] - a[0] < 64
        assert 1 <= len(a) <= 16 and 1 <= len(b) <= 16
    assert len({a[0] for a in found.a}) == 12  # another piece each


def test_documents_take_turns():
    taken = examples.spread([range(100), range(100, 103)], 8, np.random.default_rng(0))
    assert sum(item >= 100 for item in taken) == 3
    assert len(set(taken)) == 8


def test_docstring_pairs_can_be_told_apart():
    docstring = 'What this function does {}, at some length.'
    functions = [
        record('p', 'a', docstring=docstring.format(1), body='one'),
        record('p', 'b', docstring=docstring.format(1), body='two'),
        record('p', 'c', docstring=docstring.format(2), body='one'),
        record('p', 'd', docstring=docstring.format(3), body=' \n'),
        record('p', 'e', docstring='Short.', body='three'),
        record('p', 'f', docstring=docstring.format(4), body='four'),
    ]
    found = examples.docstring_pairs(functions, Letters(), n=9, length=32, seed=0)
    decode = Letters().decode
    assert sorted(map(decode, found.b)) == ['four', 'one']
    assert {decode(a) for a in found.a} == {docstring.format(i)[:32] for i in (1, 4)}
    assert sorted(found.document) == [0, 1]


def test_windows_are_whole_and_apart():
    documents = [np.arange(50), np.arange(100, 109)]
    found = examples.windows(documents, n=99, length=10, seed=0)
    assert sorted(w[0] for w in found) == [0, 10, 20, 30, 40]
    assert all(len(w) == 10 for w in found)
    (cut,) = examples.thirds([np.arange(10)], middle=4)
    assert [part.tolist() for part in cut] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]


def test_an_infill_is_a_whole_name_that_stands_elsewhere():
    letters = Letters()
    text = 'abc = fog; while self.abc: fog(abcd) + self.x or return_; abcd'
    found = set()
    for seed in range(40):
        (cut,) = examples.infills([letters.encode(text)], letters, n=1, longest=5, seed=seed)
        assert ''.join(map(letters.decode, cut)) == text
        assert len(cut.middle) <= 5
        assert not chr(cut.suffix[0]).isalnum()
        found.add(letters.decode(cut.middle))
    # Not self, while, return_ (once), x (short), nor a part of a longer name.
    assert found == {'abc', ' fog', 'fog', 'abcd'}
    assert not examples.infills(
        [letters.encode('nothing here twice')], letters, n=1, longest=5, seed=0
    )

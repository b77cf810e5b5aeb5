"""The texts that arms are measured on: apart where they must be, the same for all."""

import numpy as np
import pytest

from llama_jax.evaluate import examples
from llama_jax.evaluate.examples import Record
from llama_jax.evaluate.near import Near


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text):
        return np.array([ord(c) for c in text], np.int32)

    def decode(self, ids):
        return ''.join(chr(i) for i in ids)


def record(label, group, text='', pair=('', '')):
    return Record(text, group, label, pair)


def lines(name, n):
    """Lines that are all different, each of which names its module."""
    rng = np.random.default_rng([n, *name.encode()])
    rests = (''.join(map(chr, rng.integers(97, 123, 18))) for _ in range(n))
    return ''.join(f'{name} {rest}\n' for rest in rests)


@pytest.fixture
def records():
    """Package p has 2 + p modules."""
    return [
        record(f'p{p}', f'p{p}.m{m}', lines(f'p{p}.m{m}', 5 + 20 * m))
        for p in range(5)
        for m in range(2 + p)
    ]


def test_no_module_is_in_two_parts(records):
    found = examples.topics(records, Letters(), n_topics=2, per_topic=40, length=24, seed=0)
    assert found.names == ('p3', 'p4')  # those of most modules
    groups = [{chunk.group for chunk in part} for part in found[1:]]
    assert all(groups)
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    for part, most in zip(found[1:], (24, 6, 10), strict=True):
        for label in (0, 1):
            chunks = [chunk for chunk in part if chunk.label == label]
            assert 0 < len(chunks) <= most
            assert all(chunk.group.startswith(found.names[label] + '.') for chunk in chunks)
            assert all(len(chunk.tokens) == 24 for chunk in chunks)


def test_packages_of_few_modules_are_no_topics(records):
    found = examples.topics(records, Letters(), n_topics=9, per_topic=40, length=24, seed=0)
    assert found.names == ('p2', 'p3', 'p4')


def test_what_nearly_repeats_an_earlier_text_is_left_out(records):
    near = Near()
    text = np.arange(100, 140)
    assert not near.repeats(text) and near.repeats(text)
    changed = text.copy()
    changed[[7, 30]] = 0  # 26 of 36 runs of five tokens are the same
    assert near.repeats(changed)
    changed[[12, 17, 22, 35]] = 0
    assert not near.repeats(changed)
    assert not near.repeats(np.concatenate([text[:15], np.arange(300, 340)]))
    notice = 'Permission to use and to copy this\n'
    same = [r._replace(text=notice * 20 + r.text) for r in records]
    found = examples.topics(same, Letters(), n_topics=9, per_topic=40, length=24, seed=0)
    chunks = [Letters().decode(chunk.tokens) for part in found[1:] for chunk in part]
    assert len(chunks) > 40 and sum(chunk.startswith('Permission') for chunk in chunks) == 1


def test_of_a_long_line_only_the_beginning_is_encoded():
    encoded = []

    class Counting(Letters):
        def encode(self, text):
            encoded.append(len(text))
            return super().encode(text)

    texts = [record('', f'm{i}', lines(f'm{i}', 500).replace('\n', ' ')) for i in range(8)]
    found = examples.order(texts, Counting(), n=8, length=24, seed=0)
    assert len(found.train) > 4 and max(encoded) == 24 * 8


def test_order_is_told_by_nothing_but_order(records):
    found = examples.order(records, Letters(), n=40, length=24, seed=0)
    groups = [{chunk.group for chunk in part} for part in found[1:]]
    assert all(groups) and not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    for part in found[1:]:
        for kept, mixed in zip(part[::2], part[1::2], strict=True):
            assert (kept.label, mixed.label) == (0, 1) and kept.group == mixed.group
            runs = zip(kept.tokens.reshape(-1, 4), mixed.tokens.reshape(-1, 4), strict=True)
            for one, other in runs:
                assert sorted(one) == sorted(other)
                assert one.tolist() != other.tolist() or len(set(one.tolist())) == 1
    assert sum(map(len, found[1:])) > 40


def test_tokens_that_are_all_the_same_have_no_other_order():
    tokens = np.array([7, 7, 7, 7, 1, 2, 2, 2, 5])
    shuffled = examples._shuffled(tokens, np.random.default_rng(0))
    assert shuffled[:4].tolist() == [7, 7, 7, 7] and shuffled[8] == 5
    assert sorted(shuffled[4:8]) == [1, 2, 2, 2] and shuffled[4] == 2


def test_blocks_are_whole_lines_and_half_a_block_at_least():
    blocks = list(examples._blocks('ab\ncd\nef\ngh\nij\n', 6))
    assert blocks == ['ab\ncd\n', 'ef\ngh\n', 'ij\n']
    assert list(examples._blocks('ab\ncd\nx', 6)) == ['ab\ncd\n']


def test_two_spans_are_of_a_piece_of_four():
    found = examples.span_pairs([np.arange(400)], n=99, length=20, seed=0)
    assert len(found.a) == 5
    assert all(a[0] // 80 == b[-1] // 80 for a, b in zip(found.a, found.b, strict=True))


def test_choice_follows_the_seed_alone(records):
    def choice(records, seed):
        return examples.digest(
            examples.topics(records, Letters(), n_topics=2, per_topic=9, length=24, seed=seed)
        )

    assert choice(records, 1) == choice(records[::-1], 1)
    assert choice(records, 1) != choice(records, 2)


def test_digest_tells_shapes_and_values_apart():
    x = np.arange(4, dtype=np.int32)
    seen = [x, x + 1, [x], [x[:2], x[2:]], [x, x], (1, 'a'), (1, 'b'), np.array(['a', 'bc'])]
    seen.append(np.array(['ab', 'c']))
    assert len({examples.digest(value) for value in seen}) == len(seen)
    assert examples.digest([x, (x, 1)]) == examples.digest((x.astype(np.int64), [x, 1]))


def test_spans_of_a_pair_do_not_overlap():
    documents = [np.arange(1000 * i, 1000 * i + n) for i, n in enumerate((300, 40, 15, 900))]
    found = examples.span_pairs(documents, n=12, length=16, seed=0)
    assert len(found.a) == len(found.b) == 12
    assert set(found.document.tolist()) == {'0', '1', '3'}  # 15 tokens are too few
    for a, b, document in zip(found.a, found.b, found.document, strict=True):
        assert set(a.tolist()) | set(b.tolist()) <= set(documents[int(document)].tolist())
        assert a[-1] < b[0] and b[-1] - a[0] < 64
        assert 1 <= len(a) <= 16 and 1 <= len(b) <= 16
    assert len({a[0] for a in found.a}) == 12  # another piece each


def test_documents_take_turns():
    taken = examples.spread([range(100), range(100, 103)], 8, np.random.default_rng(0))
    assert sum(item >= 100 for item in taken) == 3
    assert len(set(taken)) == 8


def test_spans_look_for_nothing_that_is_there_twice():
    text = np.arange(40)
    documents = [text, np.append(text[:38], [90, 91]), np.arange(200, 240)]
    found = examples.span_pairs(documents, n=9, length=16, seed=0, names=['x', 'y', 'z'])
    assert len(found.a) == 2 and 'z' in found.document.tolist()


def test_pairs_can_be_told_apart():
    docstring = 'What this function does {}, at some length.'
    functions = [
        record('p', 'a', pair=(docstring.format(1), 'one')),
        record('p', 'b', pair=(docstring.format(1), 'two')),
        record('p', 'c', pair=(docstring.format(2), 'one')),
        record('p', 'd', pair=(docstring.format(3), ' \n')),
        record('p', 'e', pair=('Short.', 'three')),
        record('p', 'f', pair=(docstring.format(4), 'four')),
        record('p', 'g', pair=('七个汉字也够长', 'five')),
    ]
    found = examples.text_pairs(functions, Letters(), n=9, length=32, seed=0)
    decode = Letters().decode
    assert sorted(map(decode, found.b)) == ['five', 'four', 'one']
    firsts = {docstring.format(i)[:32] for i in (1, 4)} | {'七个汉字也够长'}
    assert {decode(a) for a in found.a} == firsts
    assert sorted(found.document) == ['0', '1', '2']
    # Pairs of one group are not independent, and wrong answers for each other all the same.
    assert sorted(found.cluster) == ['a', 'f', 'g']


def test_windows_are_whole_and_apart():
    documents = [np.arange(50), np.arange(100, 109)]
    found = examples.windows(documents, n=99, length=10, seed=0)
    assert sorted(w.tokens[0] for w in found) == [0, 10, 20, 30, 40]
    assert all(len(w.tokens) == 10 and w.document == '0' for w in found)
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
        quarter = len(text) // 4
        assert len(cut.prefix) >= quarter and len(cut.suffix) >= quarter
        found.add(letters.decode(cut.middle))
    # Not self, while, return_ (once), x (short), nor a part of a longer name.
    assert found == {'abc', ' fog', 'fog', 'abcd'}
    assert not examples.infills(
        [letters.encode('nothing here twice')], letters, n=1, longest=5, seed=0
    )

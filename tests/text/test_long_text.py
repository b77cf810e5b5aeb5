"""Texts of several parts: the ids are those of the library for the whole."""

import base64
import functools
import itertools
import random

import numpy as np
import pytest

from llama_jax.text import files, long_text
from llama_jax.text.long_text import PART
from llama_jax.text.sentencepiece_model import SentencePiece
from tests.convert import written
from tests.data.corpus import CHINESE
from tests.text.learnt import sentencepiece_model

N = 200 * 1024
LETTERS = random.Random(0)


def filled(text):
    return (text * (N // len(text) + 1))[:N]


TEXTS = {
    'chinese': filled(''.join(CHINESE)),
    'one letter': 'a' * N,
    'one letter, odd': 'b' + 'a' * (N + 7),
    'one chinese character': '滾' * N,
    'newlines': '\n' * N,
    'spaces': ' ' * N,
    'white space': ''.join(LETTERS.choices(' \n\t', k=N)),
    'dna': ''.join(LETTERS.choices('ACGT', k=N)),
    'base64': base64.b64encode(LETTERS.randbytes(N)).decode(),
    'digits': ''.join(LETTERS.choices('0123456789', k=N)),
    'joined emoji': filled('👩\u200d👩\u200d👧🇨🇭'),
    'zeros': '\0' * N,
}


@pytest.fixture(scope='module')
def code(modules):
    return filled('\n'.join(path.read_text('utf-8') for path in sorted(modules.iterdir())))


def model(texts, **settings):
    return SentencePiece(sentencepiece_model(texts, **({'vocab_size': 1500} | settings))).extended()


@pytest.fixture(scope='module')
def foreign(code):
    """With every pair of ACGT in its pieces, so that a text of them has no place to cut."""
    letters = ''.join(random.Random(1).choices('ACGT', k=4000))
    runs = ['\n' * 64, 'a' * 64, '滾' * 64, ' ' * 64, '0123456789' * 9]
    return model([*code[:100_000].splitlines(), *CHINESE, letters, *runs])


@pytest.mark.parametrize('name', TEXTS)
def test_ids_of_a_long_text_are_those_of_the_whole(foreign, name):
    text = TEXTS[name]
    ids = foreign.encode(text)
    np.testing.assert_array_equal(ids, foreign._processor.encode(text))
    assert foreign.decode(ids) == text
    assert foreign.byte_lengths[ids].sum() == len(text.encode()) + 1


def test_code_and_our_own_vocabulary(foreign, tokenizer, code):
    for one in (foreign, tokenizer):
        for text in (code, code.replace(' ', '').replace('\n', '')):
            np.testing.assert_array_equal(one.encode(text), one._processor.encode(text))
    np.testing.assert_array_equal(
        foreign.encode(code, continues=True), foreign._continuation.encode(code)
    )


@pytest.mark.parametrize('n', [PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1])
def test_lengths_around_a_part(tokenizer, n):
    for text in ('a' * n, filled('ab \n')[:n], '滾' * n, 'a' * (n - 1) + ' '):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_model_that_normalises_keeps_its_meaning(code):
    ligatures = filled('ﬁ ①  Å e\u0301 ') + code
    for settings in ({}, {'treat_whitespace_as_suffix': True}):
        nfkc = model(
            code[:100_000].splitlines(),
            normalization_rule_name='nmt_nfkc',
            remove_extra_whitespaces=True,
            **settings,
        )
        assert not nfkc.lossless
        np.testing.assert_array_equal(nfkc.encode(ligatures), nfkc._processor.encode(ligatures))


def test_a_text_is_normalised_once(tmp_path):
    rules = tmp_path / 'rules.tsv'
    rules.write_text('61\t62\n62\t63\n')  # a becomes b, and b becomes c
    lines = ['acb bca cab'] * 20
    rotated = model(lines, normalization_rule_tsv=str(rules), vocab_size=280)
    for text in ('a b c', 'a b c ' * PART):
        np.testing.assert_array_equal(rotated.encode(text), rotated._processor.encode(text))
    assert rotated.decode(rotated.encode('a b c ' * PART)[:6]).startswith('b c c')


def test_a_model_that_puts_a_space_behind_a_text_keeps_its_meaning(code):
    suffix = model(code[:100_000].splitlines(), treat_whitespace_as_suffix=True)
    assert not suffix.lossless
    np.testing.assert_array_equal(suffix.encode(code), suffix._processor.encode(code))


def test_marks_of_a_space_in_a_long_text(foreign):
    text = 'a\u2581' + 'b \u2581' * 3 + 'c ' * PART + '\u2581' + 'd' * (PART + 9)
    assert foreign.decode(foreign.encode(text)) == text


def test_no_part_is_longer_than_said(foreign):
    seen = []

    class Spy:
        def encode(self, text):
            seen.append(len(text))
            return plain.encode(text)

    plain, foreign._plain = foreign._plain, Spy()
    try:
        for name in ('dna', 'chinese', 'newlines'):
            foreign.encode(TEXTS[name])
    finally:
        foreign._plain = plain
    assert PART - 1000 < max(seen) <= PART + long_text._AHEAD
    assert len(seen) < 3 * (N // PART + 3)


def test_a_part_between_tokens_ends_with_a_character():
    seen = []

    def encode(text):  # ten bytes a token, so that most end within a character of three
        seen.append(text)
        whole, rest = divmod(len(text.encode()), 10)
        return [10] * whole + [rest] * (rest > 0)

    text = '的' * N
    parts = list(
        long_text.encode_in_parts(
            text, encode, pairs=frozenset({'的的'}), byte_lengths=np.arange(11)
        )
    )
    assert sum(part.sum() for part in parts) == len(text.encode())
    assert len(seen) == len(parts) == 4


def test_pairs_are_of_neighbours():
    assert long_text.pairs_within(['abc', 'd', '', 'cab']) == {'ab', 'bc', 'ca'}


@pytest.mark.parametrize('split', ['smollm', 'llama-bpe', 'tekken', 'deepseek-coder'])
@pytest.mark.parametrize(
    'name', ['one letter', 'spaces', 'white space', 'digits', 'chinese', 'code']
)
def test_long_texts_of_byte_level_vocabularies(code, name, split):
    bpe = byte_level(split)
    text = code if name == 'code' else TEXTS[name]
    ids = bpe.encode(text)
    np.testing.assert_array_equal(ids, bpe._theirs.encode(text, add_special_tokens=False).ids)
    assert bpe.to_bytes(ids) == text.encode()


@functools.cache
def byte_level(split):
    return files.from_gguf(written.vocabulary() | {'tokenizer.ggml.pre': split}).vocabulary


def test_byte_level_vocabularies_are_cut_between_words(code):
    bpe = files.from_gguf(written.vocabulary()).vocabulary
    for n in range(8):  # of several spaces neither begins a part
        parts = list(long_text.words_in_parts('x' * n + filled('a  b\n c ')))
        assert all(part.startswith(' a  b') for part in parts[1:]) and len(parts) == 4
    for text in (code, filled('a  b\n c ')):
        parts = list(long_text.words_in_parts(text))
        assert ''.join(parts) == text and len(parts) == -(-len(text) // PART)
        for part, following in itertools.pairwise(parts):
            assert not part[-1].isspace() and following[0] == ' ' and not following[1].isspace()
        ids = bpe.encode(text)
        np.testing.assert_array_equal(ids, bpe._theirs.encode(text).ids)
        assert bpe.decode(ids) == text
    assert list(long_text.words_in_parts(TEXTS['spaces'])) == [TEXTS['spaces']]

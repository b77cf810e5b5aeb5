import pickle

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.text import tokenizer as tokenizer_lib
from llama_jax.text.files import tokenizer_of
from llama_jax.text.sentencepiece_model import SentencePiece, bytes_tokenizer
from tests.data.corpus import CHINESE
from tests.text.learnt import sentencepiece_model

NASTY = (
    *('', ' ', '  \n', '\n\n\n', '\t\tif x:\r\n\r', '    return  x   ', '\x00', 'a\x00b'),
    *('\u2581', ' \u2581 ', '\u2581\u2581a', '\u2585', '\ufeff', '\ufffd', '\u2028', 'é e\u0301'),
    *('<mask>', '<s></s><pad>', '[R] <sentinel_3>', '<0x41>', '<unk>', '1234567890', '\x7f\x85'),
    *('👩\u200d👩\u200d👧 🇨🇭', CHINESE[0], 'ﬁ ① Å', '\U0010ffff'),
)


@pytest.fixture(scope='module')
def foreign(modules):
    lines = (modules / 'shlex.py').read_text('utf-8').splitlines()
    return sentencepiece_model(lines)


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & set(tokenizer.control.values())


@pytest.mark.parametrize('text', NASTY)
def test_decode_inverts_encode_on_nasty_text(tokenizer, text):
    check_round_trip(tokenizer, text)


PARTS = st.one_of(
    st.text(st.characters(exclude_categories=['Cs']), max_size=8), st.sampled_from(NASTY)
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.lists(PARTS, max_size=6))
def test_decode_inverts_encode_on_all_unicode_text(tokenizer, parts):
    check_round_trip(tokenizer, ''.join(parts))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(PARTS, max_size=6))
def test_a_model_with_dummy_prefix_loses_nothing_either(foreign, parts):
    text = ''.join(parts)
    tokenizer = SentencePiece(foreign).extended()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    dummy = bool(text) and not text.startswith('\u2581')
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode()) + dummy


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(PARTS, max_size=6))
def test_bytes_alone_lose_nothing(parts):
    check_round_trip(bytes_tokenizer(), ''.join(parts))


def test_library_source_round_trips(tokenizer, modules):
    for path in modules.iterdir():
        check_round_trip(tokenizer, path.read_text('utf-8'))


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match=r'U\+DC80 at character 2'):
        tokenizer.encode('ab\udc80')


def test_control_block(tokenizer):
    assert tokenizer.vocab_size == 1024 == len(tokenizer.byte_lengths)
    assert set(tokenizer.control) == set(tokenizer_lib.CONTROL_NAMES)
    ids = list(tokenizer.control.values())
    assert len(set(ids)) == len(ids) and not tokenizer.byte_lengths[ids].any()
    assert len(tokenizer.sentinel_ids) == 128
    assert list(tokenizer.sentinel_ids) == [1023 - i for i in range(128)]
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode('ab'), tokenizer.mask_id]) == 'ab'
    shown = tokenizer.decode([tokenizer.control['[R]'], tokenizer.eos_id], show_control=True)
    assert shown == '[R]</s>'
    assert tokenizer.end_ids == (tokenizer.eos_id,)


def test_bytes_of_a_token(tokenizer):
    text = f'def f(x):  return {CHINESE[0]}'
    assert b''.join(tokenizer.token_bytes(i) for i in tokenizer.encode(text)) == text.encode()
    assert tokenizer.token_bytes(tokenizer.eos_id) == b''
    for bad in (-1, 1024):
        with pytest.raises(UserError, match=f'token id {bad} is outside'):
            tokenizer.token_bytes(bad)


def test_pieces_hold_indentation_and_single_digits(tokenizer):
    eight_spaces = tokenizer.encode(' ' * 8)
    assert len(eight_spaces) == 1
    assert len(tokenizer.encode('1984')) == 4


def test_a_foreign_model_keeps_its_ids_and_gains_the_control_block(foreign):
    plain = sentencepiece.SentencePieceProcessor(model_proto=foreign)
    tokenizer = SentencePiece(foreign).extended()
    text = 'def split(s, comments=False):'
    assert tokenizer.encode(text).tolist() == plain.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2) and tokenizer.dummy_prefix
    appended = set(tokenizer.control.values()) - {1, 2}
    assert appended == set(range(plain.vocab_size(), tokenizer.vocab_size))


def test_narrowed_to_the_rows_of_a_model(foreign):
    plain = SentencePiece(foreign)
    n, whole = plain.vocab_size, plain.extended()
    narrow = whole.narrowed(n)
    assert narrow.vocab_size == n == len(narrow.byte_lengths) and narrow.whole is whole
    assert narrow.special == tokenizer_lib.Special(1, 2) and narrow.digest != whole.digest
    assert narrow.control == {'<s>': 1, '</s>': 2}
    assert narrow.encode('def f').tolist() == plain.encode('def f').tolist()
    same = pickle.loads(pickle.dumps(narrow))
    assert (same.vocab_size, same.digest, same.control) == (n, narrow.digest, narrow.control)
    assert whole.narrowed(n - 1) is None  # a word stands behind
    own = bytes_tokenizer()  # as its end does
    assert own.narrowed(own.eos_id) is None


def test_control_names_that_a_foreign_model_takes_from_text_are_closed_to_text(modules):
    lines = (modules / 'shlex.py').read_text('utf-8').splitlines()
    model = sentencepiece_model(lines, user_defined_symbols=['<mask>'])
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert plain.piece_to_id('<mask>') in plain.encode('a <mask>')
    tokenizer = SentencePiece(model).extended()
    assert tokenizer.mask_id == plain.piece_to_id('<mask>')
    assert tokenizer.mask_id not in tokenizer.encode('a <mask>')
    assert tokenizer.decode(tokenizer.encode('a <mask>')) == 'a <mask>'


def test_a_model_without_byte_fallback_learns_to_spell(modules):
    lines = (modules / 'shlex.py').read_text('utf-8').splitlines()
    tokenizer = SentencePiece(
        sentencepiece_model(lines, byte_fallback=False, vocab_size=300)
    ).extended()
    assert tokenizer.decode(tokenizer.encode(CHINESE[0])) == CHINESE[0]
    assert tokenizer.lossless


def test_the_saved_file_is_the_tokenizer_and_a_plain_model(tokenizer, tmp_path):
    path = tmp_path / 'deep' / 'tokenizer.model'
    tokenizer.save(path)
    loaded = tokenizer_of(path)
    assert loaded.digest == tokenizer.digest and loaded.control == tokenizer.control
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert plain.encode('import os') == tokenizer.encode('import os').tolist()
    assert [p.name for p in path.parent.iterdir()] == ['tokenizer.model']


def test_pickle_keeps_the_tokenizer(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).digest == tokenizer.digest
    rows = tokenizer.vocab_size + 3
    assert pickle.loads(pickle.dumps(tokenizer.padded(rows))).vocab_size == rows
    assert pickle.loads(pickle.dumps(tokenizer)).vocab_size == rows - 3


def test_files_that_are_no_tokenizer(tmp_path, modules):
    with pytest.raises(UserError, match=r'nowhere.model.*No such file'):
        tokenizer_of(tmp_path / 'nowhere.model')
    empty = tmp_path / 'empty.model'
    empty.write_bytes(b'')
    for path in (empty, modules / 'json.py'):
        with pytest.raises(UserError, match=f'{path.name}(.*SentencePiece| is empty: download)'):
            tokenizer_of(path)


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for bad in (-1, 1024):
        with pytest.raises(UserError, match=f'token id {bad} is outside the vocabulary of 1024'):
            tokenizer.decode([5, bad])

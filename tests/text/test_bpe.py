"""Byte-level vocabularies: nothing is lost, digits stand alone, no text spells a control token."""

import functools
import inspect
import itertools
import re
import textwrap

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.text import files
from llama_jax.text.bpe import BYTES, Bpe, splitter
from tests.convert import written
from tests.data.corpus import CHINESE

NASTY = (
    *(
        '',
        ' ',
        '  \n',
        '\n\n\n',
        '\t\tif x:\r\n\r',
        '    return  x   ',
        '\x00',
        'a\x00b',
        '\x7f\x85',
    ),
    *('\u2581', '\ufeff', '\ufffd', '\u2028', 'é e\u0301', '1234567890', '²½Ⅷ٣', 'ﬁ ① Å', "I'll"),
    *('<|im_end|>', '<|im_start|>system\n', '<|endoftext|><|im_end', '<s></s>', 'Ġ Ċ'),
    *('👩\u200d👩\u200d👧 🇨🇭', CHINESE[0], '\U0010ffff'),
)
PARTS = st.one_of(
    st.text(st.characters(exclude_categories=['Cs']), max_size=8), st.sampled_from(NASTY)
)


VOCABULARY = functools.cache(lambda: files.from_gguf(written.vocabulary()).vocabulary)
"""512 tokens, the first of which are control tokens; digits are split."""
BYTE = {byte: char for char, byte in BYTES.items()}


def check_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert bpe.decode(ids) == text
    assert b''.join(bpe.token_bytes(i) for i in ids) == text.encode()
    assert not set(ids.tolist()) & set(bpe.control.values())


@pytest.mark.parametrize('text', [*NASTY, *CHINESE])
def test_decode_inverts_encode_on_nasty_text(text):
    check_round_trip(VOCABULARY(), text)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.lists(PARTS, max_size=6))
def test_decode_inverts_encode_on_all_unicode_text(parts):
    check_round_trip(VOCABULARY(), ''.join(parts))


def by_hand(settings, text):
    """Token ids by definition: of all pairs, the one that was merged first is merged first."""
    ids = {token: i for i, token in enumerate(settings['tokenizer.ggml.tokens'])}
    order = {tuple(m.split(' ')): i for i, m in enumerate(settings['tokenizer.ggml.merges'])}
    found = []
    for piece in re.split(r'(\d)', text):
        for word in re.findall(WORDS, piece):
            parts = [BYTE[byte] for byte in word.encode()]
            while pairs := [pair for pair in itertools.pairwise(parts) if pair in order]:
                first = min(pairs, key=order.get)
                i = list(itertools.pairwise(parts)).index(first)
                parts[i : i + 2] = [''.join(first)]
            found += [ids[part] for part in parts]
    return found


# GPT-2's words, for text whose letters and digits `re` knows.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    'text', [*CHINESE, inspect.getsource(textwrap)[:3000], "It's  1984,\n  isn't it?  \n\n x_1 "]
)
def test_ids_are_those_of_the_definition(text):
    assert VOCABULARY().encode(text).tolist() == by_hand(written.vocabulary(), text)


def test_digits_stand_alone():
    bpe = VOCABULARY()
    pieces = [bpe.token_bytes(i) for i in bpe.encode('in 1984: 0.5')]
    digits = [piece for piece in pieces if any(48 <= byte < 58 for byte in piece)]
    assert digits == [b'1', b'9', b'8', b'4', b'0', b'5']
    # Of any vocabulary, also one that has tokens of several digits.
    words = splitter('smollm').pre_tokenize_str('in 19')
    assert [word for word, _ in words] == ['in', BYTE[32], '1', '9']


def test_control_tokens_are_ids_and_never_text():
    bpe = VOCABULARY()
    assert bpe.control == {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id, bpe.end_ids) == (1, 2, 2, (2,))
    assert bpe.decode([1, *bpe.encode('a'), 2]) == 'a'
    assert bpe.decode([1, *bpe.encode('a'), 2], show_control=True) == '<|im_start|>a<|im_end|>'
    assert bpe.token_bytes(1) == b''


def test_a_control_token_that_is_a_word_is_closed_to_text():
    tokens = {char: i for i, char in enumerate(BYTES)} | {'ab': 256, 'abc': 257}
    bpe = tiny(tokens, [('a', 'b')], control={'abc': 257}, ignore_merges=True)
    assert bpe.encode('abc').tolist() == [256, tokens['c']]


def test_whole_tokens_are_found_in_text_first():
    tokens = {char: i for i, char in enumerate(BYTES)} | {'ab': 256, 'b  ': 258}
    bpe = tiny(tokens, [('a', 'b')], control={'<e>': 257}, whole={'b  ': 258})
    assert bpe.encode('ab  a').tolist() == [tokens['a'], 258, tokens['a']]
    assert bpe.decode([256, 258]) == 'abb  ' and bpe.token_bytes(258) == b'b  '


def tiny(tokens, merges, *, control, whole=(), vocab_size=260, **settings):
    return Bpe(
        tokens,
        merges,
        splitter=splitter('gpt-2'),
        control=control,
        whole=dict(whole),
        vocab_size=vocab_size,
        bos_id=None,
        eos_id=next(iter(control.values())),
        **settings,
    )


def test_a_word_that_is_a_token_is_taken_whole_in_llama_3():
    tokens = {char: i for i, char in enumerate(BYTES)} | {'ab': 256, 'abc': 257}
    for ignore, expected in ((True, [257]), (False, [256, tokens['c']])):
        bpe = tiny(tokens, [('a', 'b')], control={'<e>': 258}, ignore_merges=ignore)
        assert bpe.encode('abc').tolist() == expected


def test_words_of_llama_3():
    words = splitter('llama-bpe').pre_tokenize_str("It's 12345\n\n  you'LL see:\n")
    expected = ['It', "'s", ' ', '123', '45', '\n\n', ' ', ' you', "'LL", ' see', ':\n']
    spelt = [''.join(BYTE[byte] for byte in word.encode()) for word in expected]
    assert [word for word, _ in words] == spelt


def test_characters_without_a_token_are_refused_not_dropped():
    tokens = {char: i for i, char in enumerate(BYTES) if BYTES[char] not in (4, 0xF1)}
    bpe = tiny(tokens, [], control={'<e>': 257})
    assert bpe.decode(bpe.encode('世界 🙂\x00')) == '世界 🙂\x00'
    for text, named in (('ab\x04', r'U\+0004 at 2'), ('\U00040000', r'U\+40000 at 0')):
        with pytest.raises(UserError, match=named):
            bpe.encode(text)


def test_lone_surrogates_are_refused():
    with pytest.raises(UserError, match=r'U\+DC80 at character 2'):
        VOCABULARY().encode('ab\udc80')


def test_ids_outside_the_vocabulary_are_refused():
    bpe = VOCABULARY()
    for bad in (-1, 512):
        for use in (bpe.decode, lambda ids: bpe.token_bytes(ids[-1])):
            with pytest.raises(UserError, match=f'token id {bad} is outside the vocabulary of 512'):
                use([5, bad])


def test_vocabularies_that_are_not_whole_are_refused():
    letters = {char: i for i, char in enumerate(BYTES)}
    for tokens, merges, control, named in (
        ({**letters, '▁the': 256}, [], {'<e>': 257}, "token '▁the' is not spelled in bytes"),
        (letters, [('a', 'b')], {'<e>': 257}, 'merges do not fit'),
        (letters, [], {'<e>': 300}, 'token id 300'),
        ({**letters, 'ab': 300}, [], {'<e>': 257}, 'token id 300'),
    ):
        with pytest.raises(UserError, match=named):
            tiny(tokens, merges, control=control)
    with pytest.raises(UserError, match="split by 'deepseek-llm'"):
        splitter('deepseek-llm')

"""Tokenizers of the library `tokenizers`: its ids, and no text spells a control token."""

import functools
import inspect
import itertools
import json
import pickle
import re
import textwrap

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.text import files
from llama_jax.text.ranks import byte_level
from llama_jax.text.special import Added, Special
from llama_jax.text.tokenizer import CONTROL_NAMES
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.words import BYTES, splitter
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
    *('<|im_end|>', '<|im_start|>system\n', '<|endoftext|><|im_end', '<s></s>', 'Ġ Ċ', '<0x41>'),
    *('👩\u200d👩\u200d👧 🇨🇭', CHINESE[0], '\U0010ffff'),
)
PARTS = st.one_of(
    st.text(st.characters(exclude_categories=['Cs']), max_size=8), st.sampled_from(NASTY)
)
TEXTS = (inspect.getsource(textwrap)[:4000], *CHINESE)
BYTE = {byte: char for char, byte in BYTES.items()}
VOCABULARY = functools.cache(lambda: files.from_gguf(written.vocabulary()).vocabulary)
"""512 tokens, the first of which are control tokens; digits are split."""


@functools.cache
def made(kind):
    """A tokenizer of the library, as models come with it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    fallback = [f'<0x{byte:02X}>' for byte in range(256)]
    control = ['<unk>', '<s>', '</s>']
    marks = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    learn = dict(vocab_size=700, show_progress=False)
    bpe = trainers.BpeTrainer(special_tokens=control + fallback, **learn)
    if kind == 'prepend':  # Llama 2 as transformers wrote it for long
        theirs = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
        theirs.normalizer = normalizers.Sequence(
            [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
        )
        theirs.decoder = decoders.Sequence([*marks, decoders.Strip(' ', 1, 0)])
        theirs.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
    elif kind == 'metaspace':
        theirs = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
        theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first')
        theirs.decoder = decoders.Sequence([*marks, decoders.Strip(' ', 1, 0)])
    elif kind == 'unigram':
        theirs = Tokenizer(models.Unigram())
        theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='never')
        theirs.decoder = decoders.Sequence(marks)
        bpe = trainers.UnigramTrainer(special_tokens=control + fallback, unk_token='<unk>', **learn)
    elif kind == 'lowercase':
        theirs = Tokenizer(models.BPE())
        theirs.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe = trainers.BpeTrainer(special_tokens=control, initial_alphabet=alphabet, **learn)
    elif kind == 'wordpiece':
        theirs = Tokenizer(models.WordPiece(unk_token='<unk>'))
        theirs.normalizer = normalizers.BertNormalizer(lowercase=False)
        theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        theirs.decoder = decoders.WordPiece()
        bpe = trainers.WordPieceTrainer(special_tokens=control, **learn)
    else:
        assert kind == 'byte_level'  # with a space before a text, in a pattern of its own
        theirs = Tokenizer(models.BPE())
        theirs.normalizer = normalizers.Sequence([])
        words = pre_tokenizers.Split(Regex(r'\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]+'), 'isolated')
        theirs.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
        )
        theirs.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe = trainers.BpeTrainer(special_tokens=control, initial_alphabet=alphabet, **learn)
    theirs.train_from_iterator(TEXTS, bpe)
    content = json.loads(theirs.to_str())
    if kind == 'unigram':
        content['model']['byte_fallback'] = True
    return json.dumps(content, ensure_ascii=False)


KINDS = ('prepend', 'metaspace', 'unigram', 'lowercase', 'wordpiece', 'byte_level')


@functools.cache
def both(kind):
    """Ours, and the library's as its users set it up to read text that spells control tokens."""
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(made(kind))
    theirs.encode_special_tokens = True
    return JsonTokenizer(made(kind).encode(), Special(1, 2)), theirs


@pytest.mark.parametrize('kind', KINDS)
def test_ids_are_the_librarys(kind):
    ours, theirs = both(kind)

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(st.lists(st.one_of(PARTS, st.sampled_from(TEXTS)), max_size=5))
    def check(parts):
        text = ''.join(parts).replace('\u2581', '')
        ids = ours.encode(text)
        if text and not any(name in text for name in ('<s>', '</s>', '<0x')):
            assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
            if kind != 'wordpiece':  # it takes away spaces before punctuation, in one piece
                decoded = theirs.decode(ids.tolist(), skip_special_tokens=False)
                assert ours.decode(ids) in (decoded, decoded.removeprefix(' '))
        assert not set(ids.tolist()) & {1, 2}
        if ours.lossless:
            assert ours.decode(ids) == text
            assert ours.byte_lengths[ids].sum() == len(text.encode()) + (
                ours.dummy_prefix and bool(text)
            )

    check()


@pytest.mark.parametrize(
    ('kind', 'spaced'),
    [('prepend', True), ('metaspace', False), ('unigram', False), ('byte_level', True)],
)
def test_what_follows_a_control_token_is_as_in_the_library(kind, spaced):
    from tokenizers import Tokenizer

    ours, theirs = both(kind)[0], Tokenizer.from_str(made(kind))
    text = 'return'
    ids = theirs.encode(f'</s>{text}', add_special_tokens=False).ids
    assert ours.space_after_control == spaced == ours.extended().space_after_control
    assert ids == [2, *ours.encode(text, continues=not ours.space_after_control)]


@pytest.mark.parametrize('kind', KINDS)
def test_text_that_goes_on_has_no_space_before_it(kind):
    ours, _ = both(kind)
    if kind != 'wordpiece':  # every word of which begins with one
        whole = [*ours.encode('return'), *ours.encode('return', continues=True)]
        assert ours.decode(whole) == 'returnreturn'


@pytest.mark.parametrize('kind', KINDS)
def test_the_control_block_comes_behind_the_models_rows(kind):
    plain, _ = both(kind)
    for rows in (0, plain.vocab_size + 7):
        ours = plain.extended(rows)
        assert set(CONTROL_NAMES) <= set(ours.control)
        assert (ours.bos_id, ours.eos_id) == (1, 2) == (ours.control['<s>'], ours.control['</s>'])
        new = [ours.control[name] for name in CONTROL_NAMES[2:]]
        assert new == list(range(max(rows, plain.vocab_size), ours.vocab_size))
        assert not ours.byte_lengths[new].any() and len(ours.sentinel_ids) == 128
        for text in (*TEXTS, '<mask> <sentinel_3> <s>'):
            np.testing.assert_array_equal(ours.encode(text), plain.encode(text))
        assert ours.extended() is ours and ours.digest != plain.digest
        same = pickle.loads(pickle.dumps(ours))
        assert (same.digest, same.control, same.special) == (
            *(ours.digest, ours.control, ours.special),
        )


def test_padding_of_a_training_is_no_token_that_means_something_else():
    plain, _ = both('byte_level')
    n = plain.vocab_size
    own = plain.with_tokens([Added('<|fill|>', n)], Special(1, 2, n)).extended()
    assert own.pad_id == own.control['<pad>'] == n
    for pad_id in (1, 2, 0):
        special = Special(1, 2, pad_id, (0,))  # bos, eos and another end
        ours = plain.with_tokens((), special).extended()
        assert ours.pad_id == ours.control['<pad>'] >= n


def test_the_digest_tells_which_tokens_begin_and_end_a_text():
    content = both('byte_level')[0].content
    specials = [Special(1, 2), Special(2, 1), Special(1, 2, 0), Special(None, 2)]
    digests = {JsonTokenizer(content, special).digest for special in specials}
    assert len(digests) == len(specials)
    assert JsonTokenizer(content, Special(1, 2)).digest in digests


def test_a_control_token_that_the_vocabulary_spells_as_a_word_stays_closed():
    # Unigram takes its own control token for a piece of text.
    ours, theirs = both('unigram')
    assert 1 in theirs.encode('a<s>a').ids
    text = '<s>a<s></s>'
    assert not {1, 2} & set(ours.encode(text).tolist()) and ours.decode(ours.encode(text)) == text
    tokens = {char: i for i, char in enumerate(BYTES)} | {'ab': 256, 'abc': 257}
    bpe = tiny(tokens, [('a', 'b')], control={'abc': 257}, ignore_merges=True)
    assert bpe.encode('abc').tolist() == [tokens['a'], tokens['b'], tokens['c']]


def test_limits_of_a_file_are_not_for_text():
    content = json.loads(made('byte_level'))
    content['truncation'] = dict(direction='Right', max_length=4, strategy='LongestFirst', stride=0)
    content['padding'] = dict(
        strategy={'Fixed': 9}, direction='Right', pad_to_multiple_of=None, pad_id=0,
        pad_type_id=0, pad_token='<unk>',
    )  # fmt: skip
    content['model']['dropout'] = 0.5
    ours, plain = JsonTokenizer(json.dumps(content).encode()), both('byte_level')[0]
    for text in ('a', TEXTS[0]):
        np.testing.assert_array_equal(ours.encode(text), plain.encode(text))


def test_added_tokens_are_found_or_closed_as_they_say():
    plain, _ = both('byte_level')
    n = plain.vocab_size
    added = [Added('<|im_end|>', n + 2), Added('<tool>', n, special=False)]
    ours = plain.with_tokens(added, Special(1, 2, None, (n + 2,)))
    assert ours.encode('x<tool>')[-1] == n and ours.decode([n]) == '<tool>'
    assert ours.control['<|im_end|>'] == n + 2 == ours.end_ids[1]
    assert n + 2 not in ours.encode('x<|im_end|>')
    np.testing.assert_array_equal(ours.encode(TEXTS[0]), plain.encode(TEXTS[0]))
    for bad in (Added('<s>', 5), Added('<|x|>', 5)):
        with pytest.raises(UserError, match='which is not its id'):
            plain.with_tokens([bad], Special())


def test_tokens_behind_the_embedding_are_left_out():
    plain, _ = both('byte_level')
    n = plain.vocab_size
    more = plain.with_tokens([Added('<a>', n), Added('<pad>', n + 1)], Special(1, 2))
    kept, outside = more.within(n + 1)
    assert kept.vocab_size == n + 1 and outside == ['<pad>'] and '<pad>' not in kept.control
    with pytest.raises(UserError, match=f'{n} tokens and the embedding {n - 1} rows'):
        more.within(n - 1)


# Byte-level vocabularies, as GGUF files hold them.


def check_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert bpe.decode(ids) == text
    assert b''.join(bpe.token_bytes(i) for i in ids) == text.encode() == bpe.to_bytes(ids)
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


def test_control_tokens_are_ids_and_never_text():
    bpe = VOCABULARY()
    assert bpe.control == {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id, bpe.end_ids) == (1, 2, 2, (2,))
    assert bpe.decode([1, *bpe.encode('a'), 2]) == 'a'
    assert bpe.decode([1, *bpe.encode('a'), 2], show_control=True) == '<|im_start|>a<|im_end|>'
    assert bpe.token_bytes(1) == b''


def tiny(tokens, merges, *, control, whole=(), **settings):
    return byte_level(
        tokens,
        merges,
        splitter=splitter('gpt-2'),
        control=control,
        whole=dict(whole),
        special=Special(None, next(iter(control.values()))),
        **settings,
    )


def test_whole_tokens_are_found_in_text_first():
    tokens = {char: i for i, char in enumerate(BYTES)} | {'ab': 256}
    bpe = tiny(tokens, [('a', 'b')], control={'<e>': 257}, whole={'b  ': 258})
    assert bpe.encode('ab  a').tolist() == [tokens['a'], 258, tokens['a']]
    assert bpe.decode([256, 258]) == 'abb  ' and bpe.token_bytes(258) == b'b  '


def test_a_word_that_is_a_token_is_taken_whole_in_llama_3():
    tokens = {char: i for i, char in enumerate(BYTES)} | {'ab': 256, 'abc': 257}
    for ignore, expected in ((True, [257]), (False, [256, tokens['c']])):
        bpe = tiny(tokens, [('a', 'b')], control={'<e>': 258}, ignore_merges=ignore)
        assert bpe.encode('abc').tolist() == expected


def test_ids_without_a_token_are_not_given_to_others():
    tokens = {char: i for i, char in enumerate(BYTES)}
    bpe = tiny(tokens, [], control={'<e>': 300})
    assert bpe.vocab_size == 301 and bpe.eos_id == 300
    assert min(set(bpe.extended().control.values()) - {300}) == 301


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
    with pytest.raises(UserError, match='cannot be read|not a tokenizer.json'):
        tiny(letters, [('a', 'b')], control={'<e>': 257})
    with pytest.raises(UserError, match="split by 'falcon-x'"):
        splitter('falcon-x')
    for content in (b'{}', b'[]', b'{"model": {"type": "BPE"}}'):
        with pytest.raises(UserError, match='not a tokenizer.json'):
            JsonTokenizer(content)

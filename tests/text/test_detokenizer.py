"""Text of a stream: the pieces joined are the text of all tokens, in whole characters."""

import codecs
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.text.detokenizer import Detokenizer

BROKEN = '\ufffd'


def token_bytes(token):
    """Tokens are bytes; 256 and above are control tokens without text."""
    return bytes([token]) if token < 256 else b''


def text_of(ids):
    """Without the beginning of a character that the end cuts off."""
    data = b''.join(map(token_bytes, ids))
    return codecs.getincrementaldecoder('utf-8')('replace').decode(data)


def pieces_of(ids, sizes):
    i = 0
    while ids:
        n = sizes[i % len(sizes)]
        yield ids[:n]
        ids, i = ids[n:], i + 1


def streamed(ids, sizes, **settings):
    detokenizer = Detokenizer(token_bytes, **settings)
    return [detokenizer(piece) for piece in pieces_of(list(ids), sizes)]


sizes = st.lists(st.integers(1, 5), min_size=1)
texts = st.text(max_size=40) | st.text('a世🙂\ufffd', max_size=8)
bytes_ = st.integers(0, 260) | st.sampled_from(list('世🙂\ufffd'.encode()))


@given(text=texts, sizes=sizes)
def test_no_character_breaks(text, sizes):
    pieces = streamed(text.encode(), sizes)
    assert ''.join(pieces) == text
    shown, sent = '', 0
    for piece, ids in zip(pieces, pieces_of(list(text.encode()), sizes), strict=True):
        shown, sent = shown + piece, sent + len(ids)
        assert len(text.encode()[:sent]) - len(shown.encode()) < 4  # nothing whole is held back


@given(ids=st.lists(bytes_, max_size=40), sizes=sizes)
def test_any_tokens_join_to_their_text(ids, sizes):
    assert ''.join(streamed(ids, sizes)) == text_of(ids)


@given(text=texts, cut=st.integers(0, 160), sizes=sizes)
def test_text_goes_on_from_any_place_of_the_prompt(text, cut, sizes):
    data = text.encode()
    prompt, rest = list(data[:cut]), list(data[cut:])
    assert text_of(prompt) + ''.join(streamed(rest, sizes, prompt=prompt)) == text


@given(prompt=texts, cut=st.integers(0, 3), ids=st.lists(bytes_, max_size=8), sizes=sizes)
def test_nothing_of_the_prompt_is_repeated(prompt, cut, ids, sizes):
    prompt = list(prompt.encode())
    prompt = prompt[: len(prompt) - cut]
    begun = bytes(prompt).decode(errors='replace')
    whole = text_of([*prompt, *ids])
    shown = ''.join(streamed(ids, sizes, prompt=prompt))
    # The beginning of a character at the prompt's end becomes whole, stays broken, or waits.
    assert shown in (
        whole.removeprefix(begun),
        whole.removeprefix(begun.removesuffix(BROKEN)),
    )
    if not begun.endswith(BROKEN):
        assert shown == whole.removeprefix(begun)


def test_character_comes_with_its_last_byte():
    assert streamed('a世'.encode(), [1]) == ['a', '', '', '世']


def test_replacement_character_of_the_text_comes_at_once():
    assert streamed(BROKEN.encode() * 2, [3]) == [BROKEN, BROKEN]
    assert streamed([0xFF, 0x41], [1]) == [BROKEN, 'A']  # bytes that make no character


def test_what_the_tokens_do_not_hold_is_not_written():
    assert streamed('a🙂'.encode()[:-1], [1]) == ['a', '', '', '']


@pytest.mark.parametrize(
    ('prompt', 'ids', 'shown'),
    [
        (BROKEN.encode(), b'a', 'a'),
        ('🙂'.encode()[:2], '🙂'.encode()[2:], '🙂'),
        ('🙂'.encode()[:2], b'a', 'a'),  # the prompt's broken end was shown with the prompt
        ('🙂'.encode()[:2], '🙂'.encode()[2:3] + b'a', 'a'),
        (BROKEN.encode()[:2], BROKEN.encode()[2:], BROKEN),
        (b'\xff', b'a', 'a'),
        ('🙂'.encode()[:3], b'\xff', BROKEN),
    ],
)
def test_prompt_that_ends_in_the_midst_of_a_character(prompt, ids, shown):
    assert ''.join(streamed(ids, [1], prompt=list(prompt))) == shown


def test_first_space():
    assert streamed(b' a b', [1], drop_space=True) == ['', 'a', ' ', 'b']
    assert streamed([256, *b' a'], [1], drop_space=True) == ['', '', 'a']
    assert streamed(b'a b', [1], drop_space=True) == ['a', ' ', 'b']
    assert streamed(b' a', [2], prompt=list(b'x')) == [' a']


@pytest.mark.parametrize('token', [0xFF, 0x80, 0x61, 256])
def test_every_token_is_looked_at_once(token):
    seen = Counter()

    def counted(one):
        seen[one] += 1
        return token_bytes(one)

    detokenizer = Detokenizer(counted, prompt=[0x62] * 1000)
    assert seen.total() <= 4
    for _ in range(1000):
        detokenizer([token])
    assert seen[token] == 1000

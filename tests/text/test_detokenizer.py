"""Text of a stream: the pieces joined are the text of all tokens, in whole characters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.text.detokenizer import Detokenizer


def by_bytes(ids):
    """A tokenizer whose tokens are bytes; 256 and above are control tokens without text."""
    return bytes(i for i in ids if i < 256).decode('utf-8', errors='replace')


def first_space_dropped(ids):
    text = by_bytes(ids)
    return text[1:] if text.startswith(' ') else text


def pieces_of(text, sizes):
    data = text if isinstance(text, list) else list(text.encode())
    i = 0
    while data:
        n = sizes[i % len(sizes)]
        yield data[:n]
        data, i = data[n:], i + 1


sizes = st.lists(st.integers(1, 5), min_size=1)


@pytest.mark.parametrize('decode', [by_bytes, first_space_dropped])
@given(text=st.text(max_size=40), sizes=sizes)
def test_no_character_breaks(decode, text, sizes):
    detokenizer = Detokenizer(decode)
    shown = ''
    for piece in pieces_of(text, sizes):
        new = detokenizer(piece)
        assert '\ufffd' not in new or '\ufffd' in text
        shown += new
        assert decode(list(text.encode())).startswith(shown)
    assert shown + detokenizer.finish() == decode(list(text.encode()))


@given(ids=st.lists(st.integers(0, 260), max_size=40), sizes=sizes)
def test_any_tokens_join_to_their_text(ids, sizes):
    detokenizer = Detokenizer(by_bytes)
    shown = ''.join([detokenizer(piece) for piece in pieces_of(ids, sizes)])
    assert shown + detokenizer.finish() == by_bytes(ids)


def test_character_comes_with_its_last_byte():
    detokenizer = Detokenizer(by_bytes)
    assert [detokenizer([byte]) for byte in 'a世'.encode()] == ['a', '', '', '世']


def test_space_after_the_prompt_and_after_control_tokens_stays():
    prompt, end = list(b' def'), 256
    detokenizer = Detokenizer(first_space_dropped, prompt=prompt)
    shown = [detokenizer(piece) for piece in ([end], list(b' f'), [end], list(b' (x)'))]
    assert shown == ['', ' f', '', ' (x)']

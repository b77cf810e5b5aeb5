"""Texts with more tokens than there is room for: refused without being read to the end, and other
threads go on meanwhile."""

import threading
import time

import numpy as np
import pytest

from llama_jax.text import long_text
from llama_jax.text.chat import ChatML, Conversation
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import SPACE
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.vocabulary import TooLongError, within
from tests.text.test_tokenizer_json import VOCABULARY, made

LOSSLESS = [VOCABULARY, bytes_tokenizer]
WORDS = 'def 你好 import\n'


@pytest.mark.parametrize('make', [*LOSSLESS, lambda: JsonTokenizer(made('lowercase').encode())])
def test_as_many_as_fit(make):
    vocabulary = make()
    ids = vocabulary.encode(WORDS)
    np.testing.assert_array_equal(vocabulary.encode(WORDS, most=len(ids)), ids)
    with pytest.raises(TooLongError, match=f'more than {len(ids) - 1} tokens: shorten'):
        vocabulary.encode(WORDS, most=len(ids) - 1)


@pytest.mark.parametrize('make', LOSSLESS)
def test_more_bytes_than_the_longest_tokens_have_are_not_read(make, monkeypatch):
    vocabulary = make()
    longest = int(vocabulary.byte_lengths.max())
    token = int(vocabulary.byte_lengths.argmax())
    # As long as it may be: so many of the longest token.
    text = vocabulary.decode([token] * 5)
    assert len(text) == 5 * longest and len(vocabulary.encode(text, most=5 * longest)) >= 5
    monkeypatch.setattr(type(vocabulary), '_encode', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(TooLongError):
        vocabulary.encode('a' * (5 * longest + 1), most=5)
    with pytest.raises(ZeroDivisionError):
        vocabulary.encode('a' * 5 * longest, most=5)


def test_a_long_text_is_read_in_parts_until_it_is_too_long(monkeypatch):
    monkeypatch.setattr(long_text, 'PART', 64)
    vocabulary, read = JsonTokenizer(made('lowercase').encode()), []
    vocabulary._cut = True  # it is not lossless, so bytes tell nothing
    plain = vocabulary._ids
    monkeypatch.setattr(vocabulary, '_ids', lambda text, how: read.append(text) or plain(text, how))
    with pytest.raises(TooLongError):
        vocabulary.encode('word ' * 1000, most=30)
    assert 1 < len(read) < 5
    read.clear()
    with pytest.raises(TooLongError):
        VOCABULARY().encode(SPACE * 1000, most=2990)


def test_a_prompt_of_several_texts_is_counted_whole():
    vocabulary, said = VOCABULARY(), [{'role': 'user', 'content': WORDS}] * 3
    for format_ in (ChatML(),):
        ids = format_.encode(Conversation(said), vocabulary)
        text = [i for i in ids if vocabulary.token_bytes(i)]
        bounded = within(vocabulary, len(text))
        assert format_.encode(Conversation(said), bounded) == ids
        with pytest.raises(TooLongError):
            format_.encode(Conversation(said), within(vocabulary, len(text) - 1))


def test_other_threads_go_on():
    """The library holds Python's lock while it encodes one text, and lets it go for a batch."""
    done, n, text = threading.Event(), 0, 'abcdefgh' * 40_000

    def tick():
        nonlocal n
        while not done.is_set():
            time.sleep(0.001)
            n += 1

    thread = threading.Thread(target=tick)
    vocabulary = VOCABULARY()
    thread.start()
    try:
        before = n
        vocabulary.encode(text)
        assert n - before > 3
    finally:
        done.set()
        thread.join()

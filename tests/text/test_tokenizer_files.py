"""Files of tokenizers: what is written for others, and what is read of theirs."""

import json

import pytest

from llama_jax.text import files
from llama_jax.text.ranks import byte_level
from llama_jax.text.special import Special
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.words import splitter
from tests.convert import written


@pytest.mark.parametrize('kind', ['word ends', 'whole words'])
def test_words_are_read_with_spaces_between(kind):
    """As the library reads them, although no token holds a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if kind == 'word ends':  # GPT-1, CLIP
        pieces = ['<s>', '</s>', 'h', 'i', 'i</w>', 'hi</w>', 'o</w>']
        merges = [('h', 'i</w>')]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        theirs = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix='</w>'))
        theirs.decoder = decoders.BPEDecoder(suffix='</w>')
    else:
        theirs = Tokenizer(models.WordLevel({'<s>': 0, '</s>': 1, 'hi': 2, 'ho': 3, '<unk>': 4}))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.add_special_tokens(['<s>', '</s>'])
    ours = JsonTokenizer(theirs.to_str().encode(), Special(0, 1))
    ids = ours.encode('hi  ho hi')
    assert ids.tolist() == theirs.encode('hi ho hi').ids
    assert ours.decode(ids).rstrip() == theirs.decode(ids.tolist()) == 'hi ho hi'


def test_a_model_without_a_row_for_our_beginning_begins_with_its_end():
    whole = files.from_gguf(
        written.vocabulary() | {'tokenizer.ggml.bos_token_id': None}
    ).vocabulary.extended()
    assert whole.bos_id == whole.control['<s>'] >= 512 <= whole.pad_id
    narrow = whole.narrowed(512)
    assert (narrow.bos_id, narrow.eos_id, narrow.pad_id, narrow.vocab_size) == (2, 2, 2, 512)
    assert narrow.control == {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2, '</s>': 2}
    assert JsonTokenizer(whole.content).narrowed(512) is None  # nothing says what ends a text


def test_file_that_is_made_of_ranks():
    """Others read it: it says what the library writes of itself."""
    from tokenizers import Tokenizer

    made = byte_level(
        {'a': 0, 'b': 1, 'ab': 4},
        [('a', 'b')],
        splitter=splitter('gpt-2'),
        control={'<s>': 3},
        whole={'<t>': 6},
        special=Special(3, 3),
        begins=True,
    )
    content = json.loads(made.content)
    assert json.loads(Tokenizer.from_str(made.content.decode()).to_str()) == content
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    assert content['added_tokens'] == [
        {'id': 3, 'content': '<s>', **flags, 'special': True},
        {'id': 6, 'content': '<t>', **flags, 'special': False},
    ]
    off = ('fuse_unk', 'byte_fallback', 'ignore_merges')
    none = ('dropout', 'unk_token', 'continuing_subword_prefix', 'end_of_word_suffix')
    tokens = {'a': 0, 'b': 1, '<row_2>': 2, '<s>': 3, 'ab': 4, '<row_5>': 5, '<t>': 6}
    assert content['model'] == {
        'type': 'BPE',
        'vocab': tokens,
        'merges': [['a', 'b']],
        **dict.fromkeys(off, False),
        **dict.fromkeys(none),
    }
    plain = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    assert content['decoder'] == plain | {'use_regex': False}
    assert content['pre_tokenizer'] == splitter('gpt-2')
    assert content['normalizer'] is content['truncation'] is content['padding'] is None


def test_characters_spelled_in_bytes_do_not_cut_a_text():
    """Where two ways to cut a text are equally likely, the rounding of their sums decides, and so
    does where a sum begins."""
    from tokenizers import Tokenizer, models

    byte = [(f'<0x{byte:02X}>', -20.0) for byte in range(256)]
    pieces = [('<unk>', 0.0), *byte, ('\n', -8.2), ('\n\n', -8.4)]
    theirs = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    ours = JsonTokenizer(theirs.to_str().encode())
    assert ours.encode('你好\n\n\n').tolist()[-2:] == [257, 258]
    assert ours.encode('好\n\n\n').tolist()[-2:] == [258, 257]

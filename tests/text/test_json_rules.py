"""Where a long text may be cut: the parts of tokenizer.json that say so."""

import pytest

from llama_jax.text import json_rules
from llama_jax.text.words import LLAMA3, by_pattern

GPT2 = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
BYTES = GPT2 | {'use_regex': False}
DIGITS = {'type': 'Digits', 'individual_digits': True}
PUNCTUATION = {'type': 'Punctuation', 'behavior': 'Isolated'}
METASPACE = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'never', 'split': True}
SPLIT = by_pattern(LLAMA3)['pretokenizers'][0]
MARK = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
WORD = {
    **{'id': 300, 'content': 'word', 'special': False},
    **dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False),
}


def cut(*words, normalizer=None, added=()):
    return json_rules.cut_before_spaces(
        {
            'normalizer': normalizer,
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': list(words)} if words else None,
            'added_tokens': list(added),
        }
    )


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        ([GPT2], True),
        ([DIGITS, GPT2], True),
        ([PUNCTUATION, GPT2], True),
        ([SPLIT, BYTES], True),
        ([METASPACE], True),
        # Merges go over spaces.
        ([], False),
        ([BYTES], False),
        ([DIGITS], False),
        ([DIGITS, BYTES], False),
        ([PUNCTUATION], False),
        ([METASPACE | {'split': False}], False),
        # What stands before a space may depend on what stands behind it.
        ([{'type': 'UnicodeScripts'}, GPT2], False),
        ([SPLIT | {'pattern': {'Regex': r'.{1,7}'}}, GPT2], False),
        ([SPLIT | {'pattern': {'String': 'x'}}, GPT2], False),
        ([SPLIT | {'behavior': 'MergedWithPrevious'}, BYTES], False),
    ],
    ids=str,
)
def test_a_space_parts_a_text_where_words_begin_with_it(words, expected):
    assert cut(*words) == expected


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        ({'normalizer': {'type': 'NFC'}}, True),
        ({'normalizer': MARK}, True),
        ({'normalizer': MARK | {'content': '▁▁'}}, False),
        ({'normalizer': MARK | {'pattern': {'String': 'a b'}}}, False),
        ({'normalizer': {'type': 'Strip', 'strip_left': True, 'strip_right': True}}, False),
        ({'added': [WORD]}, True),
        ({'added': [WORD | {'content': 'two words'}]}, False),
        ({'added': [WORD | {'lstrip': True}]}, False),
        ({'added': [WORD | {'rstrip': True}]}, False),
        ({'added': [WORD | {'single_word': True}]}, False),
        ({'added': [WORD | {'content': 'two words', 'special': True, 'lstrip': True}]}, True),
    ],
    ids=str,
)
def test_normalizers_and_added_tokens_that_look_beyond_a_space(change, expected):
    assert cut(GPT2, **change) == expected

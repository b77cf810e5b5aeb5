"""Text is split into words as vocabularies say, by the names of GGUF files."""

import json

import pytest

from llama_jax.text.words import BYTES, name_of, splitter


def words_of(name, text):
    from tokenizers import Tokenizer, models

    holder = {'version': '1.0', 'model': json.loads(Tokenizer(models.BPE()).to_str())['model']}
    parts = ('truncation', 'padding', 'normalizer', 'post_processor', 'decoder')
    content = holder | dict.fromkeys(parts) | {'added_tokens': [], 'pre_tokenizer': splitter(name)}
    found = Tokenizer.from_str(json.dumps(content)).pre_tokenizer.pre_tokenize_str(text)
    return [bytes(BYTES[char] for char in word).decode() for word, _ in found]


@pytest.mark.parametrize(
    ('name', 'text', 'expected'),
    [
        ('gpt-2', "It's 123  x\n", ['It', "'s", ' 123', ' ', ' x', '\n']),
        ('smollm', 'in 19', ['in', ' ', '1', '9']),
        (
            'llama-bpe',
            "It's 12345\n\n  you'LL see:\n",
            ['It', "'s", ' ', '123', '45', '\n\n', ' ', ' you', "'LL", ' see', ':\n'],
        ),
        ('qwen2', "it's 123!", ['it', "'s", ' ', '1', '2', '3', '!']),
        ('tekken', 'aBcD x12/\n', ['a', 'Bc', 'D', ' x', '1', '2', '/\n']),
        ('llama4', "isNt's 1234", ['is', "Nt's", ' ', '123', '4']),
        ('deepseek-coder', 'a b12\nc 滾滾', ['a', ' b', '1', '2', '\n', 'c', ' ', '滾滾']),
        ('deepseek-v3', '1234a 滾滾!x', ['123', '4', 'a', ' ', '滾滾', '!x']),
    ],
)
def test_words(name, text, expected):
    assert words_of(name, text) == expected


def test_the_name_of_a_pre_tokenizer():
    gpt2, digits = splitter('gpt-2'), splitter('smollm')
    assert name_of(digits, whole_words=False) == 'smollm'
    for part in (
        gpt2,
        gpt2 | {'trim_offsets': False},
        {'type': 'Sequence', 'pretokenizers': [gpt2]},
    ):
        assert name_of(part, whole_words=False) == 'gpt-2'
        assert name_of(part, whole_words=True) is None
    llama3 = splitter('llama-bpe')
    assert name_of(llama3, whole_words=True) == 'llama-bpe'
    assert name_of(llama3, whole_words=False) == 'smaug-bpe'  # the same words
    assert name_of(gpt2 | {'add_prefix_space': True}, whole_words=False) is None

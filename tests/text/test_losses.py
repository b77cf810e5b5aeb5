"""What a tokenizer does to text that decoding cannot undo is said."""

import json

import pytest

from llama_jax.text.sentencepiece_model import SentencePiece
from llama_jax.text.special import Special
from llama_jax.text.tokenizer_json import JsonTokenizer
from tests.data.corpus import CHINESE
from tests.text.learnt import sentencepiece_model
from tests.text.test_tokenizer_json import both, made


@pytest.mark.parametrize(
    ('kind', 'losses', 'prefix'),
    [
        ('prepend', [], True),
        ('metaspace', ['beginning of a text'], True),
        ('unigram', [], False),
        ('lowercase', ['NFKC', 'Lowercase'], False),
        ('wordpiece', ['BertNormalizer', 'white space', 'spaces between', 'unknown token'], True),
        ('byte_level', ['beginning of a text'], True),
    ],
)
def test_what_is_lost_is_said(kind, losses, prefix):
    ours, _ = both(kind)
    assert len(ours.losses) == len(losses)
    assert all(word in said for word, said in zip(losses, ours.losses, strict=True))
    assert ours.dummy_prefix == prefix and ours.lossless == (not losses)


@pytest.mark.parametrize('kind', ['prepend', 'metaspace', 'unigram'])
def test_a_tokenizer_json_without_a_space_says_so(kind):
    content = json.loads(made(kind))
    model = content['model']
    if kind == 'unigram':
        model['vocab'] = [x for x in model['vocab'] if '▁' not in x[0]]
    else:
        left_out = {x for x in model['vocab'] if '▁' in x}
        model['merges'] = [
            pair for pair in model['merges'] if not {*pair, ''.join(pair)} & left_out
        ]
        kept = [x for x in model['vocab'] if x not in left_out]
        model['vocab'] = {token: i for i, token in enumerate(kept)}
    tokenizer = JsonTokenizer(json.dumps(content).encode(), Special(1, 2))
    assert tokenizer.decode(tokenizer.encode('天 地')) != '天 地'
    assert any('spaces become U+2581' in words for words in tokenizer.losses)


@pytest.mark.parametrize('space', [True, False])
def test_a_vocabulary_without_a_space_says_so(space):
    """As one that is learnt from Chinese alone: the library then spells the mark of a space."""
    lines = [line.replace(' ', '') for line in CHINESE] + ['天 地'] * space
    tokenizer = SentencePiece(
        sentencepiece_model(
            lines, add_dummy_prefix=False, vocab_size=400, allow_whitespace_only_pieces=True
        )
    )
    assert tokenizer.lossless == space
    assert (tokenizer.decode(tokenizer.encode('天 地')) == '天 地') == space
    assert space or 'spaces become U+2581' in tokenizer.losses[0]


def test_a_model_that_normalises_says_so(modules):
    lines = (modules / 'shlex.py').read_text('utf-8').splitlines()
    assert not SentencePiece(
        sentencepiece_model(lines, normalization_rule_name='nmt_nfkc')
    ).lossless

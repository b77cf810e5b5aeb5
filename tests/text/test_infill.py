"""Prompts for the text between two others, as the makers of each model write them."""

import functools

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llama_jax.data.pieces import Piece
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.text import infill
from llama_jax.text.sentencepiece_model import SentencePiece, bytes_tokenizer
from llama_jax.text.special import Special
from llama_jax.text.tokenizer_json import JsonTokenizer

TEXTS = (('def f(', '):\n    pass'), (' 你', '🙂 '), ('', 'b'), ('<|fim_suffix|>', '<fim_middle>'))
MARKS = {
    'qwen': '<|fim_prefix|> <|fim_suffix|> <|fim_middle|> <|fim_pad|> <|file_sep|>',
    'starcoder': '<fim_prefix> <fim_suffix> <fim_middle> <fim_pad> <file_sep>',
    'deepseek': '<｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜> <|EOT|>',
}


@functools.cache
def library(kind):
    """A tokenizer of bytes with the marks of a maker, of the library that reads their files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(['<s>', '</s>', '<|endoftext|>'])
    # Qwen's files do not call them special.
    (made.add_tokens if kind == 'qwen' else made.add_special_tokens)(MARKS[kind].split())
    return made


@pytest.mark.parametrize('kind', MARKS)
@pytest.mark.parametrize(('prefix', 'suffix'), TEXTS[:3])
def test_ids_are_the_librarys_of_the_text_with_marks(kind, prefix, suffix):
    theirs = library(kind)
    ours = JsonTokenizer(theirs.to_str().encode(), Special(256, 257))
    found = infill.by_vocabulary(ours, ids=ours.vocab_size)
    before, between, behind, *ends = MARKS[kind].split()
    text = before + prefix + between + suffix + behind
    assert list(found.prompt(prefix, suffix, ours)) == theirs.encode(text).ids
    ids = ours.encode(prefix).tolist()
    assert found.prompt(ids, suffix, ours) == found.prompt(prefix, suffix, ours)
    assert {theirs.token_to_id(name) for name in ends} <= {*found.ends}
    assert (theirs.token_to_id('<|endoftext|>') in found.ends) == (kind != 'deepseek')


def test_marks_in_a_text_are_text_where_they_are_control_tokens():
    ours = JsonTokenizer(library('starcoder').to_str().encode(), Special(256, 257))
    found = infill.by_vocabulary(ours, ids=ours.vocab_size)
    prompt = found.prompt('<fim_suffix>', '<fim_middle>', ours)
    assert prompt.count(found.suffix) == prompt.count(found.middle) == 1


def test_models_that_know_no_marks():
    ours = JsonTokenizer(library('qwen').to_str().encode(), Special(256, 257))
    (middle,) = ours.encode('<|fim_middle|>').tolist()
    assert infill.by_vocabulary(ours, ids=middle + 1) is not None
    assert infill.by_vocabulary(ours, ids=middle) is None, 'it has no embedding of the last mark'
    assert infill.by_vocabulary(bytes_tokenizer(), ids=10**6) is None, 'not every model is trained'


def test_words_that_a_vocabulary_lacks_are_no_marks():
    """All of them become one token, of what is unknown."""
    from tokenizers import Tokenizer, models

    content = Tokenizer(models.WordLevel({'a': 0, '<s>': 1, '</s>': 2, '?': 3}, unk_token='?'))
    ours = JsonTokenizer(content.to_str().encode(), Special(1, 2))
    assert ours.encode('<|fim_prefix|>').tolist() == [3]
    assert infill.by_vocabulary(ours, ids=4) is None


@functools.cache
def code_llama(kind):
    """A model of SentencePiece that puts a space before each text, and has the marks."""
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = proto.SentencePiece
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.pieces.add(piece='<unk>', type=kinds.UNKNOWN)
    for name in ('<s>', '</s>'):
        proto.pieces.add(piece=name, type=kinds.CONTROL)
    for name in ('▁<PRE>', '▁<SUF>', '▁<MID>', '▁<EOT>'):
        proto.pieces.add(piece=name, type=getattr(kinds, kind))
    for byte in range(256):
        proto.pieces.add(piece=f'<0x{byte:02X}>', type=kinds.BYTE)
    for i, piece in enumerate(('▁', 'd', 'e', 'de', '▁de', 'p', '☺')):
        proto.pieces.add(piece=piece, type=kinds.NORMAL, score=-i)
    return proto.SerializeToString()


@pytest.mark.parametrize('kind', ['CONTROL', 'USER_DEFINED'])
@pytest.mark.parametrize(('prefix', 'suffix'), [*TEXTS, ('def', 'def'), ('de', ' de')])
def test_code_llama_as_its_makers_encode_it(prefix, suffix, kind):
    """The space before a text stands before the prefix, and before no suffix: there they put a
    character before it and take it off again (generation.py of Code Llama)."""
    ours = SentencePiece(code_llama(kind), Special(1, 2))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=code_llama(kind))
    found = infill.by_vocabulary(ours, ids=ours.vocab_size)
    p, s, m, end = (theirs.piece_to_id(f'▁<{name}>') for name in ('PRE', 'SUF', 'MID', 'EOT'))
    smile = theirs.encode('☺')
    after = theirs.encode('☺' + suffix)[len(smile) :]
    assert list(found.prompt(prefix, suffix, ours)) == [p, *theirs.encode(prefix), s, *after, m]
    assert found.ends == (end,)


@pytest.mark.parametrize('spaced', [False, True])
@pytest.mark.parametrize('suffix_first', [False, True])
def test_a_model_of_ours_reads_what_it_was_trained_on(suffix_first, spaced):
    """The tokens of training up to the middle, of all places where a text can be split; also by a
    vocabulary that puts a space before a text."""
    theirs = SentencePiece(code_llama('CONTROL'), Special(1, 2))
    ours = theirs.extended() if spaced else bytes_tokenizer()
    assert ours.dummy_prefix == spaced
    text = 'né 你'
    asked = infill.own(ours, suffix_first=suffix_first)
    asked_for = {
        asked.prompt(text[:i], text[k:], ours): text[i:k]
        for i in range(len(text) + 1)
        for k in range(i, len(text) + 1)
    }
    objective = FillInMiddle(rate=1.0, spm=float(suffix_first))
    tokens = ours.encode(text, continues=True)
    middles = set()
    for seed in range(30):
        piece = Piece(tokens, 0, len(tokens) + 1, 0.0, (64,), 0)
        rng = np.random.default_rng(seed)
        made = objective.example(piece, tokenizer=ours, seq_len=64, rng=rng)
        ids = [*made['inputs'].tolist(), int(made['targets'][-1])]
        end = ids.index(*asked.ends)
        heads = [tuple(ids[1:n]) for n in range(1, end + 1)]
        middles |= {
            (asked_for[head], ours.to_bytes(ids[1 + len(head) : end]).decode())
            for head in heads
            if head in asked_for
        }
        assert ids[0] == ours.bos_id and any(head in asked_for for head in heads)
    assert len(middles) > 5 and all(wanted == learnt for wanted, learnt in middles)

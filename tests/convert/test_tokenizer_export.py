"""Tokenizers in the words of GGUF and of Hugging Face give the ids that they give here."""

import json
import random

import pytest
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from llama_jax.convert import ggml_vocabulary, tokenizer_files
from llama_jax.data.train_tokenizer import train
from llama_jax.errors import UserError
from llama_jax.text import files, words
from llama_jax.text.sentencepiece_model import SentencePiece
from llama_jax.text.special import Special
from llama_jax.text.tokenizer import SPACE
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.vocabulary import encode_spelled
from tests.convert import written
from tests.data.corpus import CHINESE
from tests.text import learnt

TEXTS = ('a', ' a', '  a   b\t\n', *CHINESE[:2], 'def f(x):\n  return x+12', '\U0001f600 e\u0301')
FLAGS = dict.fromkeys(('add_prefix_space', 'trim_offsets', 'use_regex'), True)
SPECIAL = Special(bos_id=1, eos_id=2, end_ids=(0,))


def in_gguf(tokenizer, rows=None, end_ids=None):
    rows = rows or tokenizer.vocab_size
    ends = end_ids or tokenizer.end_ids
    return ggml_vocabulary.of_tokenizer(tokenizer, begin=True, end_ids=ends, rows=rows)


def assert_same_ids(tokenizer):
    """Read from either, and by the library."""
    back = files.from_gguf(in_gguf(tokenizer))
    assert back.begin == (tokenizer.bos_id,)
    assert back.vocabulary.end_ids == tokenizer.end_ids
    made = tokenizer_files.made(tokenizer, begin=True, context=99, template='{{ 1 }}')
    assert made['chat_template.jinja'] == b'{{ 1 }}'
    theirs = Library.from_str(made['tokenizer.json'].decode())
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert back.vocabulary.encode(text).tolist() == ids, text
        assert theirs.encode(text).ids == [tokenizer.bos_id, *ids], text
        assert theirs.decode(ids) == text
    return made


def byte_level(**changes):
    content = json.loads(written.trained().to_str())
    content['decoder'] = {'type': 'ByteLevel', **FLAGS}
    return JsonTokenizer(json.dumps(content | changes).encode(), SPECIAL)


def sentencepiece(kind='bpe', **normalizer):
    """A model of 600 pieces; with other settings of its normaliser."""
    tokenizer = train(list(CHINESE), vocab=600, kind=kind)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.content)
    for name, value in normalizer.items():
        setattr(proto.normalizer_spec, name, value)
    return SentencePiece(proto.SerializeToString())


def shuffled():
    """A model whose ids are in no order, with words that text spells and that are found first."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(sentencepiece().content)
    pieces = list(proto.pieces)
    rest = pieces[3:]
    random.Random(0).shuffle(rest)
    del proto.pieces[:]
    proto.pieces.extend(pieces[:3] + rest)
    for word in ('return', SPACE * 3):
        proto.pieces.add(piece=word, type=4)
    return SentencePiece(proto.SerializeToString())


@pytest.mark.parametrize(
    'make',
    [
        shuffled,
        byte_level,
        lambda: byte_level().extended(),  # as it is trained with
        sentencepiece,
        lambda: sentencepiece(add_dummy_prefix=True),
    ],
    ids=['shuffled', 'byte-level', 'for training', 'SentencePiece', 'space before'],
)
def test_ids_are_the_same(make):
    tokenizer = make()
    settings = json.loads(assert_same_ids(tokenizer)['tokenizer_config.json'])
    assert settings['model_max_length'] == 99 and settings['add_bos_token']
    assert not settings['add_eos_token'] and not settings['clean_up_tokenization_spaces']


@pytest.mark.parametrize('prefix', [True, False])
@pytest.mark.parametrize('spaced', [True, False], ids=['legacy', 'not legacy'])
def test_spaces_beside_control_tokens_are_as_here(tmp_path, caplog, prefix, spaced):
    """`legacy` of Mistral's tokenizers, and tokens that take what is beside them, as Phi-3's."""
    content = sentencepiece(add_dummy_prefix=prefix).extended().content
    mask = SentencePiece(content).control['<mask>']
    tokenizer = SentencePiece(content, Special(spaced=spaced, takes=((mask, False, True),)))
    made = tokenizer_files.made(tokenizer, begin=True, context=9, template=None)
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    theirs = Library.from_str(made['tokenizer.json'].decode())
    back = files.from_huggingface(tmp_path, vocab=tokenizer.vocab_size).vocabulary
    alone = JsonTokenizer(made['tokenizer.json'], tokenizer.special)
    for text in ('<sep>a', '<sep> a', 'a <sep> <sep>a\n', '<mask> \n b', 'a<mask>b', 'a  b'):
        ids = encode_spelled(tokenizer, text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert encode_spelled(back, text) == ids, text
        assert encode_spelled(alone, text) == ids, text
    # Of the library a space at the begin of a text is the one that is put there.
    assert bool(caplog.records) == (prefix and not spaced)


def test_names_that_are_ours_alone_are_in_no_file(caplog):
    model = learnt.sentencepiece_model(
        CHINESE, vocab_size=400, model_type='bpe', bos_piece='<|bos|>'
    )
    tokenizer = SentencePiece(model).extended()
    assert tokenizer.control['<s>'] == tokenizer.control['<|bos|>'] == tokenizer.bos_id
    made = tokenizer_files.made(tokenizer, begin=True, context=9, template=None)
    assert json.loads(made['tokenizer_config.json'])['bos_token'] == '<|bos|>'
    assert not caplog.records


def test_a_template_whose_name_is_a_path_is_left_out(caplog):
    named = {'rag': 'a', '../../evil': 'b', 'tool/use': 'c', 'C:\\x': 'd'}
    made = tokenizer_files.made(byte_level(), begin=True, context=9, template=None, named=named)
    assert [name for name in made if 'templates' in name] == ['additional_chat_templates/rag.jinja']
    assert len(caplog.records) == 3 and '../../evil' in caplog.text


@pytest.mark.parametrize('around', [('<s>', '$A', '</s>'), ('$A', '</s>'), ('<s>', '$A'), ('$A',)])
@pytest.mark.parametrize('begin', [True, False])
def test_a_prompt_never_ends_in_an_end(around, begin):
    """As a tokenizer.json with add_eos_token has it, or one of an encoder."""
    with_marks = Library.from_str(byte_level().content.decode())
    marks = [('<s>', 1), ('</s>', 2)]
    with_marks.post_processor = TemplateProcessing(single=list(around), special_tokens=marks)
    tokenizer = JsonTokenizer(with_marks.to_str().encode(), SPECIAL)
    made = tokenizer_files.made(tokenizer, begin=begin, context=9, template=None)
    theirs = Library.from_str(made['tokenizer.json'].decode())
    plain = theirs.encode('ab', add_special_tokens=False).ids
    assert theirs.encode('ab').ids == [tokenizer.bos_id] * begin + plain


def test_a_sentencepiece_model_of_which_only_the_json_is_left():
    for prefix in (False, True):
        made = assert_same_ids(sentencepiece(add_dummy_prefix=prefix))
        assert made['tokenizer.model']
        left = JsonTokenizer(made['tokenizer.json'], Special(bos_id=1, eos_id=2))
        assert in_gguf(left)['tokenizer.ggml.model'] == 'llama'
        assert 'tokenizer.model' not in assert_same_ids(left)
    content = json.loads(made['tokenizer.json'])
    del content['model']['merges'][::2]  # a piece that only one of its halves makes
    with pytest.raises(UserError, match='llama.cpp would give .* other tokens'):
        in_gguf(JsonTokenizer(json.dumps(content).encode(), Special(bos_id=1, eos_id=2)))


def test_merges_may_be_written_as_strings():
    """As the library `tokenizers` wrote them before its release 0.20."""
    made = tokenizer_files.made(sentencepiece(), begin=True, context=9, template=None)
    left = JsonTokenizer(made['tokenizer.json'], Special(bos_id=1, eos_id=2))
    for tokenizer in (byte_level(), left):
        content = json.loads(tokenizer.content)
        content['model']['merges'] = [' '.join(pair) for pair in content['model']['merges']]
        older = JsonTokenizer(json.dumps(content).encode(), tokenizer.special)
        assert in_gguf(older) == in_gguf(tokenizer)


@pytest.mark.parametrize(('whole', 'name'), [(True, 'llama-bpe'), (False, 'smaug-bpe')])
def test_whether_a_word_that_is_a_token_is_taken_whole_is_part_of_the_name(whole, name):
    model = json.loads(written.trained().to_str())['model']
    model['ignore_merges'] = whole
    # A token that none of its merges leads to.
    model['merges'] = [pair for pair in model['merges'] if ''.join(pair) != 'in']
    tokenizer = byte_level(model=model, pre_tokenizer=words.by_pattern(words.LLAMA3))
    settings = in_gguf(tokenizer)
    assert settings['tokenizer.ggml.pre'] == name
    back = files.from_gguf(settings).vocabulary
    assert back.encode('in').tolist() == tokenizer.encode('in').tolist()
    assert (len(back.encode('in')) == 1) == whole


def test_bos_is_taken_away_where_no_text_begins_with_it():
    made = tokenizer_files.made(sentencepiece(), begin=True, context=9, template=None)
    with_bos = JsonTokenizer(made['tokenizer.json'], Special(bos_id=1, eos_id=2))
    made = tokenizer_files.made(with_bos, begin=False, context=9, template=None)
    assert 1 not in Library.from_str(made['tokenizer.json'].decode()).encode('a').ids
    assert not json.loads(made['tokenizer_config.json'])['add_bos_token']
    assert 'chat_template.jinja' not in made


def test_kinds_of_tokens():
    settings = in_gguf(byte_level(), rows=515)
    tokens, kinds = (settings[f'tokenizer.ggml.{name}'] for name in ('tokens', 'token_type'))
    assert tokens[:3] == list(written.CONTROL) and kinds[:3] == [3, 3, 3]
    assert set(kinds[3:512]) == {1} and kinds[512:] == [5, 5, 5]
    assert settings['tokenizer.ggml.pre'] == 'smollm'
    assert settings['tokenizer.ggml.eot_token_id'] == 0
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized', 'special'), False)
    added = json.loads(written.trained().to_str())['added_tokens']
    added += [{'id': 512, 'content': 'a word', **flags}]
    settings = in_gguf(byte_level(added_tokens=added), rows=514)
    assert settings['tokenizer.ggml.tokens'][512] == 'a word'
    assert settings['tokenizer.ggml.token_type'][511:] == [1, 4, 5]

    model = sentencepiece()
    settings = in_gguf(model)
    kinds = settings['tokenizer.ggml.token_type']
    assert set(kinds) == {1, 2, 3, 6} and kinds[settings['tokenizer.ggml.unknown_token_id']] == 2
    made = tokenizer_files.made(model, begin=True, context=9, template=None)
    left = JsonTokenizer(made['tokenizer.json'], Special(bos_id=1, eos_id=2))
    assert in_gguf(left)['tokenizer.ggml.token_type'] == kinds


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda: sentencepiece('unigram'), 'another type than bpe'),
        (lambda: sentencepiece(remove_extra_whitespaces=True), 'normalises text'),
        (lambda: byte_level(normalizer={'type': 'NFC'}), 'no name here'),
        (
            lambda: byte_level(pre_tokenizer={'type': 'ByteLevel', **FLAGS}),
            'no name here',
        ),
    ],
    ids=['unigram', 'spaces', 'NFC', 'prefix'],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        in_gguf(make())


def test_what_is_said(caplog):
    in_gguf(byte_level(), end_ids=(2, 0, 1, 3))
    assert '(2, 0, 1, 3) that end a text, GGUF has names for the first three' in caplog.text
    caplog.clear()
    made = tokenizer_files.made(sentencepiece('unigram'), begin=True, context=9, template=None)
    assert json.loads(made['tokenizer.json'])['model']['type'] == 'Unigram'
    assert "tokenizer.json gives '<0x41>' other tokens than the model" in caplog.text
    with pytest.raises(UserError, match='normalises text'):
        tokenizer_files.made(
            sentencepiece(remove_extra_whitespaces=True), begin=True, context=9, template=None
        )


def test_a_difference_is_found():
    """The comparison that warns sees a merge too few."""
    tokenizer = sentencepiece()
    content = json.loads(tokenizer_files.of_sentencepiece(tokenizer.content).to_str())
    whole = Library.from_str(json.dumps(content))
    content['model']['merges'].pop()
    less = Library.from_str(json.dumps(content))
    assert isinstance(less.model, BPE)
    assert tokenizer_files.difference(lambda t: whole.encode(t).ids, tokenizer.content) is None
    assert tokenizer_files.difference(lambda t: less.encode(t).ids, tokenizer.content)
